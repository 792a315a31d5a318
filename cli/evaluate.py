"""``diptych evaluate``: score a checkpoint on held-out data."""

import argparse
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

EPILOG = """example:
  diptych evaluate runs/demo-pretrain galleries='[openmoji_no_people,test_word]' examples=8
  diptych evaluate runs/demo-pretrain data=my-shards/val probe.enabled=false
  diptych evaluate ViT-B-32:laion2b_s34b_b79k data=my-shards zero_shot.classes=classes.yaml
"""


def add_parser(subparsers: Any) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser(
        "evaluate",
        help="retrieval, zero-shot and linear-probe scores of a checkpoint",
        description="Score a run, a checkpoint or an open_clip model (ARCH:TAG) on held-out data: retrieval "
        "both ways, zero-shot classes, linear probe, each beside chance and a 95 %% interval. Writes "
        "evaluate.json and evaluate/*.png into the run's folder.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "checkpoint", help="run folder, checkpoint folder, .safetensors file or open_clip ARCH:TAG"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings, for instance data=FOLDER"
    )
    parser.add_argument("--config", help="a YAML file of settings", default=None)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Evaluate, print the table, say where the files are."""
    from rich.console import Console

    from ..configs.load import load_config
    from ..pretrain.config import PretrainConfig
    from ..pretrain.evaluate import EvaluateConfig, evaluate
    from ..pretrain.galleries import run_folder
    from ..pretrain.tracking import track_evaluation

    config = load_config(EvaluateConfig, args.config, args.overrides)
    console = Console() if sys.stdout.isatty() else Console(width=120)  # files and pipes have no width
    result = evaluate(args.checkpoint, config, progress=_progress)
    print_scores(result, console)
    run = run_folder(args.checkpoint)
    if run is not None and (run / "config.yaml").is_file():
        track_evaluation(run, load_config(PretrainConfig, run / "config.yaml").tracking, result)
    return 0


@contextmanager
def _progress(what: str, total: int) -> Generator[Callable[[int], None]]:
    """A bar on standard error, so that standard output holds the scores alone."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.advance(task, done)


def _row(score: dict[str, Any]) -> list[str]:
    majority = f"{score['majority']:.3f}" if "majority" in score else "-"
    interval = f"{score['low']:.3f} to {score['high']:.3f}"
    return [f"{score['value']:.3f}", interval, f"{score['chance']:.4f}", majority]


def print_scores(result: dict[str, Any], console: Any) -> None:
    """The scores of evaluate.json as tables."""
    from rich.markup import escape
    from rich.table import Table

    def table(title: str, first: tuple[str, ...]) -> Table:
        made = Table(title=title, title_justify="left", header_style="", box=None, pad_edge=False)
        for name in first:
            right = name in ("at", "classes", "pictures")
            made.add_column(name, overflow="fold", justify="right" if right else "left")
        for name in ("score", "95 % interval", "chance", "majority"):
            made.add_column(name, justify="right", no_wrap=True)
        return made

    shown = table("Retrieval", ("gallery", "direction", "at"))
    for gallery, got in result["retrieval"].items():
        for direction in ("image_to_text", "text_to_image"):
            for k, score in got[direction].items():
                shown.add_row(escape(gallery), direction.replace("_", " "), k, *_row(score))
    if shown.row_count:
        console.print(shown, "")
    for key, title in (("zero_shot", "Zero-shot accuracy"), ("linear_probe", "Linear probe accuracy")):
        shown = table(title, ("labels", "classes", "pictures"))
        for name, got in result[key].items():
            shown.add_row(escape(name), str(got["classes"]), str(got["n"]), *_row(got["accuracy"]))
        if shown.row_count:
            console.print(shown, "")
    for note in result["notes"]:
        console.print(note, markup=False, soft_wrap=True)
    for file in ("evaluate.json", *result["pictures"].values()):
        console.print(f"wrote {result['folder']}/{file}", markup=False, soft_wrap=True)
