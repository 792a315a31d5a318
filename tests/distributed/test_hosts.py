"""Runs over two hosts under torchrun's ``--nnodes=1:2`` that lose one and go on with the other. The hosts are
network namespaces, with a cable between them that can be pulled."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path

import psutil
import pytest

from ..pretrain.train_runs import finish, launch, losses, make_data, write_config

pytestmark = [pytest.mark.slow, pytest.mark.mount, pytest.mark.timeout(1200)]

STEPS = 600
PORT = 29411
# dropped patches are drawn by each rank, and a low rate keeps rounding from growing
EXACT = ("model.vision_cfg.patch_dropout=0.0", "optim.lr=1e-4", f"train.total_samples={STEPS * 16}")
RUN = ("watch.timeout_s=6", "checkpoint.every_steps=5")  # in the midst of epochs, which have three steps

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "cable",
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # else no host can come back: torch looks for it in vain
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hosts")
    return write_config(folder / "run.yaml", make_data(folder / "data"))


@pytest.fixture(scope="module")
def alone(config: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, float]]:
    """Losses of one undisturbed process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    finish(launch(config, out, 1, *EXACT))
    return losses(out)


def ip(words: str) -> int:
    if shutil.which("ip") is None:
        pytest.skip("there is no iproute2")
    return subprocess.run(["ip", *words.split()], capture_output=True).returncode


class Hosts:
    """Two of them: ``head``, where the agents meet, and ``other``; ``last`` has rank 1."""

    def __init__(self, config: Path, out: Path, last: str) -> None:
        self.config, self.out = config, out
        self.agents: dict[str, subprocess.Popen[str]] = {}
        names = ["head", "other"] if last == "other" else ["other", "head"]
        self.address = {name: f"10.91.7.{number}" for number, name in enumerate(names, 1)}
        self.space = {name: f"diptych-{os.getpid()}-{name}" for name in names}
        if any(ip(f"netns add {space}") for space in self.space.values()):
            self.close()
            pytest.skip("this user may not make network namespaces")
        one, two = self.space.values()
        assert not ip(f"link add cable netns {one} type veth peer name cable netns {two}")
        for name, space in self.space.items():
            assert not ip(f"-n {space} addr add {self.address[name]}/24 dev cable")
            assert not ip(f"-n {space} link set lo up")
            self.cable(name, "up")

    def cable(self, name: str, way: str) -> None:
        assert not ip(f"-n {self.space[name]} link set cable {way}")

    def start(self, name: str) -> None:
        """An agent with one process of the run."""
        command = [
            *("ip", "netns", "exec", self.space[name], sys.executable, "-m", "torch.distributed.run"),
            *("--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=3", "--monitor-interval=0.2"),
            *("--rdzv-backend=c10d", f"--rdzv-endpoint={self.address['head']}:{PORT}", "--rdzv-id=test"),
            f"--rdzv-conf=is_host={name == 'head'},last_call_timeout=3,keep_alive_interval=1,read_timeout=10",
            f"--local-addr={self.address[name]}",
            *("-m", "diptych.pretrain", str(self.config), f"out={self.out}", *RUN, *EXACT),
        ]
        with self.log(name).open("a") as log:
            self.agents[name] = subprocess.Popen(
                command, env={**os.environ, **ENVIRONMENT}, stdout=subprocess.DEVNULL, stderr=log, text=True
            )

    def log(self, name: str) -> Path:
        return self.out.parent / f"{name}.log"

    def told(self, name: str) -> str:
        return self.log(name).read_text()

    def kill(self, name: str, *, ranks: bool) -> None:
        agent = self.agents.pop(name)
        below = psutil.Process(agent.pid).children(recursive=True) if ranks else []
        for process in (agent, *below):
            process.kill()
        agent.wait()

    def wait_for(self, step: int) -> None:
        end, metrics = time.monotonic() + 300, self.out / "metrics.jsonl"
        while not metrics.is_file() or f'"step": {step},' not in metrics.read_text():
            assert self.agents["head"].poll() is None, self.told("head")[-3000:]
            assert time.monotonic() < end
            time.sleep(0.02)

    def close(self) -> None:
        for agent in self.agents.values():
            if agent.poll() is None:
                agent.send_signal(signal.SIGKILL)  # its processes save and end
            agent.wait()
        for space in self.space.values():
            ip(f"netns del {space}")


@pytest.fixture
def hosts(config: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Generator[Hosts]:
    made = Hosts(config, tmp_path / "run", getattr(request, "param", "other"))
    yield made
    made.close()


def check(hosts: Hosts, alone: list[tuple[int, float]]) -> None:
    """The run ended by itself, with every global batch of the undisturbed one in its place."""
    assert hosts.agents["head"].wait(600) == 0, hosts.told("head")[-3000:]
    assert (hosts.out / "finished.json").exists()
    mine = losses(hosts.out)
    assert [step for step, _ in mine] == [*range(1, STEPS + 1)]
    for (step, a), (_, b) in zip(mine, alone, strict=True):
        assert a == pytest.approx(b, rel=5e-4), step


@pytest.mark.parametrize("ranks", [False, True], ids=["agent", "host"])
def test_a_killed_host_is_done_without_and_may_come_back(
    ranks: bool, hosts: Hosts, alone: list[tuple[int, float]]
) -> None:
    """Also where its agent alone is killed: its process saves, and is no request to stop for the others."""
    for name in ("head", "other"):
        hosts.start(name)
    hosts.wait_for(30)
    hosts.kill("other", ranks=ranks)
    hosts.wait_for(60)
    hosts.start("other")
    check(hosts, alone)
    assert hosts.agents["other"].wait(120) == 0, hosts.told("other")[-3000:]
    starts = [line for line in hosts.told("head").splitlines() if " steps of " in line]
    assert [line.count("2 processes") for line in starts] == [1, 0, 1]


@pytest.mark.parametrize("hosts", ["other", "head"], indirect=True, ids=["rank_1", "rank_0"])
def test_a_host_cut_off_in_mid_step_is_done_without(hosts: Hosts, alone: list[tuple[int, float]]) -> None:
    for name in ("head", "other"):
        hosts.start(name)
    hosts.wait_for(35)  # between evaluations, for which the others wait longer
    hosts.cable("other", "down")
    check(hosts, alone)
    for name in ("head", "other"):
        told = [line for line in hosts.told(name).splitlines() if line.startswith("error: ")]
        assert len(told) == 1
        assert "another process of this run does not answer" in told[0]


def test_without_the_host_where_the_agents_meet_the_other_ends_and_both_go_on(
    hosts: Hosts, alone: list[tuple[int, float]]
) -> None:
    for name in ("head", "other"):
        hosts.start(name)
    hosts.wait_for(30)
    hosts.kill("head", ranks=True)
    assert hosts.agents["other"].wait(120) == 1, hosts.told("other")[-3000:]
    told = [line for line in hosts.told("other").splitlines() if line.startswith("error: ")]
    assert len(told) == 1
    assert "another process of this run has ended" in told[0]
    assert not (hosts.out / "finished.json").exists()
    assert not (hosts.out / "stopped.json").exists()
    for name in ("head", "other"):
        hosts.start(name)
    check(hosts, alone)
