"""W&B that cannot be reached, or that refuses: its real client, against a port where nobody listens."""

import socket
import threading
from collections.abc import Generator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import wandb

from diptych.configs.errors import UserError
from diptych.pretrain import tracking
from diptych.pretrain.tracking import Tracker, TrackingConfig, track_evaluation
from diptych.pretrain.train import train

from .train_runs import BATCH, load, losses, make_data, write_config
from .wandb_file import history

ONLINE = TrackingConfig(wandb="online")


@pytest.fixture(autouse=True)
def nobody_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Generator[None]:
    """A server's address where there is none, and a key for it."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{unused.getsockname()[1]}")
        monkeypatch.delenv("WANDB_MODE")
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
        monkeypatch.setattr(tracking, "INIT_S", 8.0)
        wandb.teardown()  # it reads the environment once
        yield
        wandb.teardown()


def files(run: Path) -> list[Path]:
    return list((run / "wandb").glob("offline-run-*/*.wandb"))


def test_a_run_starts_and_keeps_its_numbers_while_the_server_is_away(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = write_config(tmp_path / "run.yaml", make_data(tmp_path / "data"), evaluate={"data": None})
    out = tmp_path / "run"
    words = ("tracking.wandb=online", f"train.total_samples={2 * BATCH}")
    assert train(load(config, out, *words)).step == 2
    (told,) = [text for text in caplog.messages if "W&B" in text]
    assert "cannot be had (CommError: " in told
    assert told.endswith(f"this start stays in {out / 'wandb'}, for `wandb sync`")
    (file,) = files(out)
    seen = [row for row in history(file) if "train/loss" in row]
    assert [(row["step"], row["train/loss"]) for row in seen] == losses(out)


def test_a_missing_login_is_told_before_a_run_begins_and_ends_none_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    with pytest.raises(UserError, match=r"cannot start a run online .*wandb login.*tracking.wandb=offline"):
        Tracker(tmp_path / "new", ONLINE, {})
    tracker = Tracker(tmp_path / "old", ONLINE, {}, strict=False)
    tracker.log({"kind": "train", "step": 3, "loss": 1.5})
    tracker.finish()
    assert "W&B cannot be had (UsageError: " in caplog.text
    assert [row["train/loss"] for row in history(files(tmp_path / "old")[0]) if "train/loss" in row] == [1.5]


class Refuses(BaseHTTPRequestHandler):
    """A server that knows no key."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.send_error(401)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def test_a_refused_key_is_told_before_a_run_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with HTTPServer(("127.0.0.1", 0), Refuses) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
        try:
            with pytest.raises(UserError, match=r"cannot start a run online .*tracking.wandb=offline"):
                Tracker(tmp_path, ONLINE, {})
        finally:
            server.shutdown()
            thread.join()


def test_scores_that_w_and_b_does_not_take_are_no_failure_of_evaluate(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    result: dict[str, Any] = {key: {} for key in ("retrieval", "zero_shot", "linear_probe")}
    result |= {"checkpoint": "a", "folder": str(tmp_path), "pictures": {"examples": "gone.png"}}
    track_evaluation(tmp_path, TrackingConfig(), result)
    assert "the scores did not reach W&B (" in caplog.text
