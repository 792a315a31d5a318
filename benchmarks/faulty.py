"""One training of ``faults.py``: the same small CLIP by Diptych, open_clip's trainer or Accelerate, with a
fault in it, in a process that ``killing.Forker`` starts.

Every function takes one word, a JSON of: ``run`` (its folder), ``shards``, ``config`` (the trainer's own),
``journal`` (a file that gets a line for each step with the samples that it learnt from, and one for each save
with its seconds) and the fault, any of ``die_at`` and ``term_at`` (a step that sends itself SIGKILL or
SIGTERM), ``nan_at`` (a step whose loss is not a number) and ``die_in_save`` (number of a save, seconds).
"""

import functools
import importlib
import io
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

BATCH, PER_EPOCH, EPOCHS, CAPTION = 16, 12, 3, "picture number {} of a square"
MODEL: dict[str, Any] = {
    "embed_dim": 64,
    "vision_cfg": {"layers": 3, "width": 128, "head_width": 32, "patch_size": 8, "image_size": 32},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}
LR, WARMUP = 1e-3, 6  # steps


class Watch:
    """Writes the journal and lets the fault happen."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job, self.step, self.saves = job, 0, 0
        self._file = open(job["journal"], "a")  # noqa: SIM115 # as long as the process lives
        self._begun = 0.0

    def learn(self, step: int, samples: Iterable[int]) -> None:
        """A step is under way."""
        self.step = step
        self._write({"step": step, "samples": [int(sample) for sample in samples]})
        if step == self.job.get("die_at"):
            os.kill(os.getpid(), signal.SIGKILL)
        if step == self.job.get("term_at"):
            os.kill(os.getpid(), signal.SIGTERM)

    def poisoned(self, loss: torch.Tensor) -> torch.Tensor:
        return loss * float("nan") if self.step == self.job.get("nan_at") else loss

    def saving(self) -> None:
        self.saves += 1
        self._begun = time.perf_counter()
        number, delay = self.job.get("die_in_save", (0, 0.0))
        if number == self.saves:
            signal.setitimer(signal.ITIMER_REAL, max(delay, 1e-4))  # SIGALRM, which nobody handles

    def saved(self) -> None:
        self._write({"save": self.saves, "seconds": time.perf_counter() - self._begun})

    def around(self, save: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(save)
        def watched(*arguments: Any, **options: Any) -> Any:
            self.saving()
            result = save(*arguments, **options)
            self.saved()
            return result

        return watched

    def _write(self, row: dict[str, Any]) -> None:
        print(json.dumps(row), file=self._file, flush=True)


def diptych(words: list[str]) -> int:
    """``diptych pretrain``."""
    job = json.loads(words[0])
    watch = Watch(job)
    train: Any = importlib.import_module("diptych.pretrain.train")
    steps = [int(p.name.removeprefix("step_")) for p in Path(job["run"]).glob("checkpoints/step_*")]
    forward, loss, first = train.forward_backward, train.contrastive_loss, max(steps, default=0)
    calls = 0

    def counting(model: Any, batch: dict[str, Any], *arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        # a damaged newest checkpoint is passed over: the loop knows where it really stands
        watch.learn(job.get("first", first) + calls, batch["sample_id"][batch["valid"]].tolist())
        return forward(model, batch, *arguments, **options)

    train.forward_backward = counting
    train.contrastive_loss = lambda **options: watch.poisoned(loss(**options))

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "os.mkdir" and str(arguments[0]).endswith(".tmp"):
            watch.saving()
        elif event == "os.rename" and str(arguments[0]).endswith(".tmp") and "step_" in str(arguments[1]):
            watch.saved()

    sys.addaudithook(hook)
    main = importlib.import_module("diptych.cli.main").main
    return int(main(["pretrain", job["config"], f"out={job['run']}", f"data.train={job['shards']}"]))


def open_clip(words: list[str]) -> int:
    """``open_clip_train.main --resume latest``."""
    job = json.loads(words[0])
    watch = Watch(job)
    library: Any = importlib.import_module("open_clip")
    main: Any = importlib.import_module("open_clip_train.main")
    train: Any = importlib.import_module("open_clip_train.train")
    library.add_model_config(job["config"])
    tokens = library.get_tokenizer("faults")([CAPTION.format(i) for i in range(BATCH * PER_EPOCH)])
    number = {tuple(row): i for i, row in enumerate(tokens.tolist())}
    plain, one_epoch, backward = library.CLIP.forward, main.train_one_epoch, train.backward
    place = [0]

    def epoch(model: Any, data: Any, loss: Any, epoch: int, *arguments: Any, **options: Any) -> Any:
        place[0] = epoch * PER_EPOCH
        return one_epoch(model, data, loss, epoch, *arguments, **options)

    def forward(self: Any, image: Any = None, text: Any = None) -> Any:
        place[0] += 1
        watch.learn(place[0], [number[tuple(row)] for row in text.tolist()])
        return plain(self, image, text)

    main.train_one_epoch, library.CLIP.forward = epoch, forward
    train.backward = lambda loss, scaler: backward(watch.poisoned(loss), scaler)
    torch.save = watch.around(torch.save)
    tars = "::".join(str(tar) for tar in sorted(Path(job["shards"]).glob("*.tar")))
    run = Path(job["run"])
    arguments = ["--model", "faults", "--train-data", tars, "--dataset-type", "webdataset"]
    arguments += ["--train-num-samples", BATCH * PER_EPOCH, "--batch-size", BATCH, "--epochs", EPOCHS]
    arguments += ["--workers", 0, "--precision", "fp32", "--device", "cpu", "--warmup", WARMUP, "--lr", LR]
    arguments += ["--logs", run.parent, "--name", run.name, "--save-frequency", 1, "--resume", "latest"]
    arguments += ["--save-most-recent"]  # written beside and renamed, which is the safest that it has
    main.main([str(word) for word in arguments])
    return 0


class Counter:
    """Steps that are done."""

    def __init__(self) -> None:
        self.step = 0

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]


def accelerate(words: list[str]) -> int:
    """A loop as in Accelerate's guide to checkpoints: ``save_state``, ``load_state``, the newest of two."""
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration, ProjectConfiguration, set_seed
    from open_clip import CLIP, ClipLoss, get_tokenizer
    from safetensors.torch import save_file
    from torch.utils.data import DataLoader, TensorDataset

    from diptych.data.shards import open_shards

    job = json.loads(words[0])
    watch, run = Watch(job), Path(job["run"])
    shards = open_shards(job["shards"])
    pictures = [Image.open(io.BytesIO(shards.read(i).image)) for i in range(len(shards))]
    pixels = torch.stack([torch.tensor(np.array(picture)).permute(2, 0, 1) for picture in pictures])
    tokens = get_tokenizer("ViT-B-32", context_length=16)([CAPTION.format(i) for i in range(len(shards))])
    set_seed(0)
    accelerator = Accelerator(
        cpu=True,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
        project_config=ProjectConfiguration(str(run), automatic_checkpoint_naming=True, total_limit=2),
    )
    model = CLIP(**MODEL, output_dict=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    data = TensorDataset(pixels.float() / 255, tokens, torch.arange(len(shards)))
    loader = DataLoader(data, batch_size=BATCH, shuffle=True, drop_last=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    counter, loss = Counter(), ClipLoss()
    accelerator.register_for_checkpointing(counter)
    folders = sorted(int(p.name.split("_")[1]) for p in run.glob("checkpoints/checkpoint_*"))
    if folders:
        accelerator.load_state()
        accelerator.project_configuration.iteration = folders[-1] + 1
    save = watch.around(accelerator.save_state)
    for epoch in range(counter.step // PER_EPOCH, EPOCHS):
        loader.set_epoch(epoch)
        done = counter.step % PER_EPOCH
        for images, texts, numbers in accelerator.skip_first_batches(loader, done) if done else loader:
            watch.learn(counter.step + 1, numbers.tolist())
            accelerator.backward(watch.poisoned(loss(**model(images, texts))))
            optimizer.step()
            optimizer.zero_grad()
            counter.step += 1
            if counter.step % job["every"] == 0:
                save()
    final = {name: value.contiguous() for name, value in accelerator.unwrap_model(model).state_dict().items()}
    save_file(final, run / "final.safetensors")
    return 0
