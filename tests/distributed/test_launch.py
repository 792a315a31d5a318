"""The launcher ends as its processes do, and says nothing of its own."""

import signal
import subprocess
import sys
import time
from pathlib import Path

LAUNCH = [sys.executable, "-m", "diptych.pretrain.launch", "--nproc-per-node", "2"]


def run(script: str, tmp_path: Path) -> subprocess.Popen[str]:
    (tmp_path / "job.py").write_text(script)
    command = [*LAUNCH, str(tmp_path / "job.py")]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_failed_process_gives_its_code_and_its_words_alone(tmp_path: Path) -> None:
    script = """
import os, sys, time
if os.environ["RANK"] == "0":
    print("error: x", file=sys.stderr)
    sys.exit(2)
time.sleep(60)
"""
    job = run(script, tmp_path)
    out, err = job.communicate(timeout=120)
    assert (job.returncode, out, err) == (2, "", "error: x\n")


def test_a_killed_process_gives_the_shells_code(tmp_path: Path) -> None:
    job = run("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n", tmp_path)
    out, err = job.communicate(timeout=120)
    assert (job.returncode, out, err) == (128 + signal.SIGKILL, "", "")


def test_an_interrupt_reaches_every_process_once(tmp_path: Path) -> None:
    script = f"""
import os, signal, time
told = []
signal.signal(signal.SIGINT, lambda *_: told.append(1))
open({str(tmp_path)!r} + "/ready" + os.environ["RANK"], "w").close()
while not told:
    time.sleep(0.05)
time.sleep(1)
os.write(1, f"{{os.environ['RANK']}} {{len(told)}}\\n".encode())  # at once, as the other writes there, too
"""
    job = run(script, tmp_path)
    while not all((tmp_path / f"ready{rank}").exists() for rank in (0, 1)):
        assert job.poll() is None
        time.sleep(0.05)
    job.send_signal(signal.SIGINT)
    out, err = job.communicate(timeout=120)
    assert (job.returncode, sorted(out.splitlines()), err) == (130, ["0 1", "1 1"], "")
