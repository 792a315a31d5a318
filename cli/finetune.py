"""``diptych finetune``: train fusion heads on a labelled table and score them."""

import argparse
import sys
from typing import Any

EPILOG = """example:
  diptych finetune configs/demo/finetune_match.yaml
  diptych finetune configs/demo/finetune_match.yaml heads='[concat, bilinear]' eval.seeds='[0]' out=runs/quick

The same command goes on where it stopped: finished heads are kept as long as their settings and data are."""


def add_parser(subparsers: Any) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser(
        "finetune",
        help="train fusion heads on a labelled table of pictures and texts",
        description="Train fusion heads (and with adapt.method=lp_ft the encoders) on a labelled table, "
        "score them once on the test rows beside chance and the best single modality, and keep everything "
        "that `diptych predict` needs in the run folder.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="a YAML file, for instance configs/demo/finetune_match.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the file's")
    parser.add_argument("--print-config", action="store_true", help="print the resolved config and stop")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Train, score, print the table, say where the files are."""
    from rich.console import Console

    from ..configs.load import load_config, to_yaml
    from ..finetune.config import FinetuneConfig

    config = load_config(FinetuneConfig, args.config, args.overrides)
    if args.print_config:
        print(to_yaml(config), end="")
        return 0
    from ..finetune.protocol import finetune, run_folder
    from .progress import progress

    result = finetune(config, progress=progress, say=lambda text: print(text, file=sys.stderr, flush=True))
    console = Console() if sys.stdout.isatty() else Console(width=120)  # files and pipes have no width
    print_results(result, console)
    folder = run_folder(config)
    for file in ("results.json", "predictions.parquet"):
        console.print(f"wrote {folder}/{file}", markup=False, soft_wrap=True)
    console.print(f"try: diptych predict {folder} TABLE.csv -o OUT.csv", markup=False, soft_wrap=True)
    return 0


def print_results(result: dict[str, Any], console: Any) -> None:
    """The heads of results.json as a table, best first, and the headline."""
    from rich.table import Table

    heads = result["heads"]
    metrics = list(next(iter(heads.values()))["metrics"])[:3]
    title = (
        f"{result['n_test']:,} test rows in {result['n_test_groups']:,} groups; chance {result['chance']:.3f}"
    )
    table = Table(title=title, title_justify="left", header_style="", box=None, pad_edge=False)
    table.add_column("head")
    for name in ("fusion", metrics[0], "95 % interval", "gain", "95 % interval", *metrics[1:], "time"):
        table.add_column(name, justify="left" if name == "fusion" else "right", no_wrap=True)
    for name in sorted(heads, key=lambda name: -heads[name]["metrics"][metrics[0]]["value"]):
        head = heads[name]
        score, gain = head["metrics"][metrics[0]], head.get("vs_best_single")
        table.add_row(
            f"{name} *" if name == result["best"] else name,
            f"{head['stage']} / {head['level']}",
            f"{score['value']:.3f}",
            _interval(score),
            f"{gain['diff']:+.3f}" if gain else "-",
            _interval(gain, "+") if gain else "-",
            *(_number(head["metrics"][m]["value"]) for m in metrics[1:]),
            f"{head['seconds']:.1f} s",
        )
    console.print(table, "")
    console.print(
        f"* chosen on the inner rows; gain: paired, over {result['best_single']}, the best single modality "
        "there",
        soft_wrap=True,
    )
    console.print(result["headline"], markup=False, soft_wrap=True)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _interval(score: dict[str, Any], sign: str = "") -> str:
    return f"{score['low']:{sign}.3f} to {score['high']:{sign}.3f}"
