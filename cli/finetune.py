"""``diptych finetune``: train fusion heads on a labelled table and score them."""

import argparse
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from .unread import still_read

SHOWN = 12  # classes of a label histogram on the console

EPILOG = """example:
  diptych finetune configs/demo/finetune_match.yaml
  diptych finetune configs/demo/finetune_match.yaml heads='[concat, bilinear]' eval.seeds='[0]' out=runs/quick
  diptych finetune configs/demo/finetune_match.yaml --validate
  diptych finetune configs/demo/finetune_match.yaml 'eval.cv={rows: without_test}'
  diptych finetune configs/demo/finetune_match.yaml 'eval.cv={rows: without_test}' --holdout
  torchrun --standalone --nproc-per-node 2 -m diptych.finetune configs/demo/finetune_match.yaml

The same command goes on where it stopped: finished heads are kept as long as their settings and data are."""


def add_parser(subparsers: Any) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser(
        "finetune",
        help="train fusion heads on a labelled table of pictures and texts",
        description="Train fusion heads (and with adapt.method the encoders) on a labelled table, "
        "score them once on the test rows beside chance and the best single modality, and keep everything "
        "that `diptych predict` needs in the run folder.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="a YAML file, for instance configs/demo/finetune_match.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the file's")
    parser.add_argument(
        "--validate",
        action="store_true",
        help="train nothing; tell what is wrong with the table, exit code 1 if scores would not be honest",
    )
    parser.add_argument(
        "--holdout",
        action="store_true",
        help="leave eval.cv and score the fixed test split (data.split), in the folder holdout of the run",
    )
    parser.add_argument("--json", action="store_true", help="with --validate: print what was found as JSON")
    parser.add_argument("--print-config", action="store_true", help="print the resolved config and stop")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Train, score, print the table, say where the files are."""
    from ..configs.errors import UserError
    from ..configs.load import load_config, to_yaml
    from ..configs.parent import end_with_launcher
    from ..finetune.config import FinetuneConfig

    if args.json and not args.validate:
        raise UserError("--json belongs to --validate; add it, or read results.json after the run")
    held = ["eval.holdout=true"] if args.holdout else []
    config = load_config(FinetuneConfig, args.config, [*args.overrides, *held])
    if args.print_config:
        print(to_yaml(config), end="")
        return 0
    if args.validate:
        return _validate(config, as_json=args.json)
    from ..finetune.protocol import finetune, run_folder
    from .progress import progress

    end_with_launcher()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # how a launcher ends the others when one has ended
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    result = finetune(config, progress=progress, say=_say)
    if os.environ.get("RANK", "0") == "0":
        still_read("stdout", lambda: _print_end(result, run_folder(config)))
    return 0


def _say(text: str) -> None:
    still_read("stderr", lambda: print(text, file=sys.stderr, flush=True))


def _print_end(result: dict[str, Any], folder: Path) -> None:
    """The results, and where they are."""
    console = _console()
    print_results(result, console)
    for file in ("results.json", "predictions.parquet"):
        console.print(f"wrote {folder}/{file}", markup=False, soft_wrap=True)
    console.print(f"try: diptych predict {folder} TABLE.csv -o OUT.csv", markup=False, soft_wrap=True)


def _console() -> Any:
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=120)  # files and pipes have no width


def _validate(config: Any, *, as_json: bool) -> int:
    """Print what is wrong with the table; 1 if something fails."""
    from ..finetune.validate import validate
    from .progress import progress

    report = validate(config, progress=progress)
    if as_json:
        print(json.dumps(report, indent=1, ensure_ascii=False))
    else:
        print_report(report, _console())
    return 0 if report["clean"] else 1


def print_report(report: dict[str, Any], console: Any) -> None:
    """Parts with their labels and missing shares as a table, then the findings."""
    from rich.markup import escape
    from rich.table import Table

    title = f"{report['rows']:,} rows in {report['groups']:,} groups"
    table = Table(title=title, title_justify="left", header_style="", box=None, pad_edge=False)
    missing = list(report["parts"][0]["missing"])
    for name in ("part", "rows", "groups", *(f"no {k}" for k in missing), "labels"):
        table.add_column(name, justify="left" if name in ("part", "labels") else "right")
    for part in report["parts"]:
        labels = [
            f"{name} {value:,}" if isinstance(value, int) else f"{name} {value:.4g}"
            for name, value in part["labels"].items()
        ]
        more = f", and {len(labels) - SHOWN} more" if len(labels) > SHOWN else ""
        shares = [f"{100 * part['missing'][k]:.1f} %" for k in missing]
        sizes = [f"{part['rows']:,}", f"{part['groups']:,}"]
        table.add_row(part["name"], *sizes, *shares, escape(", ".join(labels[:SHOWN]) + more))
    console.print(table, "")
    if "trainings" in report:
        console.print(f"planned: {report['trainings']}", markup=False, soft_wrap=True)
    for finding in report["findings"]:
        rows = f" (for instance {', '.join(finding['examples'])})" if finding["examples"] else ""
        kind = "FAILS" if finding["fails"] else "note"
        console.print(f"{kind}: {finding['text']}{rows}", markup=False, soft_wrap=True)
    said = "clean: nothing found that would make scores dishonest" if report["clean"] else "not clean"
    console.print(said, markup=False)


def print_results(result: dict[str, Any], console: Any) -> None:
    """The heads of results.json as a table, best first, the folds, the fusion gain, and the headline."""
    from rich.table import Table

    from ..finetune.report.protocol import protocol_note, threshold_note
    from ..finetune.tasks.task import higher_is_better

    heads = result["heads"]
    shown = 1 if result.get("type") == "retrieval" else 3  # all of its metrics stand in a table of their own
    metrics = list(next(iter(heads.values()))["metrics"])[:shown]
    chance = f"; chance {_number(result['chance'])}" if result.get("chance") is not None else ""
    title = f"{result['n_test']:,} test rows in {result['n_test_groups']:,} groups{chance}"
    if "cv" in result:
        repeats = result["cv"]["repeats"]
        title += f"; {result['cv']['folds']} folds" + (f", {repeats} times" if repeats > 1 else "")
    table = Table(title=title, title_justify="left", header_style="", box=None, pad_edge=False)
    table.add_column("head")
    for name in ("fusion", metrics[0], "95 % interval", "gain", "95 % interval", *metrics[1:], "time"):
        table.add_column(name, justify="left" if name == "fusion" else "right", no_wrap=True)
    sign = -1 if higher_is_better(metrics[0]) else 1
    for name in sorted(heads, key=lambda name: sign * (heads[name]["metrics"][metrics[0]]["value"] or 0.0)):
        head = heads[name]
        score, gain = head["metrics"][metrics[0]], head.get("vs_best_single")
        table.add_row(
            f"{name} *" if name == result["best"] else name,
            f"{head['stage']} / {head['level']}",
            _number(score["value"]),
            _interval(score),
            _number(gain["diff"], "+") if gain else "-",
            _interval(gain, "+") if gain else "-",
            *(_number(head["metrics"][m]["value"]) for m in metrics[1:]),
            f"{head['seconds']:.1f} s",
        )
    console.print(table, "")
    if "folds" in result:
        _print_folds(result, console)
    if "missing" in result:
        _print_missing(result["missing"], console)
    if "search" in result:
        _print_search(result["search"], console)
    over = f"{result['best_single']}, the best single modality there"
    if result.get("type") == "retrieval":
        over = "zero_shot, the encoders as they were"
        _print_retrieval(result, console)
    console.print(f"* chosen on the inner rows; gain: paired, over {over}", soft_wrap=True)
    if "note" in result:
        console.print(result["note"], markup=False, soft_wrap=True)
    if "fusion_gain" in result:
        console.print(result["fusion_gain"]["text"], markup=False, soft_wrap=True)
    if "chosen_per_fold" in result:
        anew = result["chosen_per_fold"]
        score, gain = anew["score"], anew["gain"]
        console.print(
            f"Chosen anew in every fold by its own inner rows: {anew['metric']} {_number(score['value'])} "
            f"({_interval(score)}), gain {_number(gain['value'], '+')} ({_interval(gain, '+')}).",
            markup=False,
            soft_wrap=True,
        )
    for note in (protocol_note(result), threshold_note(result), result["headline"]):
        if note:
            console.print(note, markup=False, soft_wrap=True)


def _print_folds(result: dict[str, Any], console: Any) -> None:
    """Every fold's score of the recommended head and of the best single modality, and their spread."""
    from rich.table import Table

    names = list(dict.fromkeys((result["best_single"], result["best"])))
    title = f"{result['folds'][0]['metric']} by fold: spread, not an interval"
    table = Table(title=title, title_justify="left", header_style="", box=None, pad_edge=False)
    for name in ("repeat", "fold", "train", "inner", "test", "groups", *names, "gain"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in result["folds"]:
        sizes = [f"{row[key]:,}" for key in ("n_train", "n_inner", "n_test", "n_test_groups")]
        scores = [_number(row["scores"][name]) for name in names]
        gain = _number(row["gain"], "+")
        table.add_row(str(row["repeat"]), str(row["fold"]), *sizes, *scores, gain)
    spread = [_number(result["spread"].get(name, {}).get("sd")) for name in names]
    table.add_row("", "s.d.", "", "", "", "", *spread, "")
    console.print(table, "")


def _print_retrieval(result: dict[str, Any], console: Any) -> None:
    """All metrics of the baseline and of the recommended head beside chance."""
    from rich.table import Table

    from ..finetune.scores.retrieval_results import gallery_words

    names = list(dict.fromkeys((result["best_single"], result["best"])))
    title = f"among {gallery_words(result)}"
    table = Table(title=title, title_justify="left", header_style="", box=None, pad_edge=False)
    table.add_column("metric")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
        table.add_column("95 % interval", justify="right", no_wrap=True)
    table.add_column("chance", justify="right", no_wrap=True)
    for metric, chance in result["chances"].items():
        scores = [result["heads"][name]["metrics"][metric] for name in names]
        cells = [shown for score in scores for shown in (_number(score["value"]), _interval(score))]
        table.add_row(metric, *cells, _number(chance))
    console.print(table, "")


def _print_missing(missing: dict[str, Any], console: Any) -> None:
    """The recommended head's first metric with modalities missing: a line per what is seen."""
    from rich.table import Table

    title = f"{missing['metric']} of {missing['head']} where modalities are missing, by share of rows hit"
    table = Table(title=title, title_justify="left", header_style="", box=None, pad_edge=False)
    table.add_column("seen")
    for rate in missing["rates"]:
        table.add_column(f"{100 * rate:.0f} %", justify="right", no_wrap=True)
        table.add_column("95 % interval", justify="right", no_wrap=True)
    lines: dict[str, list[str]] = {}
    for cell in missing["cells"]:
        score = cell["metrics"][missing["metric"]]
        lines.setdefault(cell["seen"], []).extend((_number(score["value"]), _interval(score)))
    for seen, cells in lines.items():
        table.add_row(seen if seen in ("both", "all") else f"{seen} alone", *cells)
    console.print(table, "")


def _print_search(search: dict[str, Any], console: Any) -> None:
    """What the search made of each head's inner score, and that this is no score to tell."""
    from rich.table import Table

    console.print(
        f"Search: inner {search['metric']} of one seed, the best of {search['trials']} trials. Such scores "
        "are too hopeful; only those of the test rows count.",
        markup=False,
        soft_wrap=True,
    )
    table = Table(header_style="", box=None, pad_edge=False)
    for name in ("head", "as written", "chosen", "time"):
        table.add_column(name, justify="left" if name == "head" else "right", no_wrap=True)
    for name, entries in search["heads"].items():
        means = [_mean([entry[key] for entry in entries]) for key in ("before", "after")]
        seconds = sum(entry["seconds"] for entry in entries)
        table.add_row(name, *map(_number, means), f"{seconds:.1f} s")
    for name in search["as_written"]:
        table.add_row(name, "-", "not searched", "-")
    console.print(table, "")


def _mean(values: list[float | None]) -> float | None:
    """The mean; None if some training came to no number."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def _number(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.3f}"


def _interval(score: dict[str, Any], sign: str = "") -> str:
    return f"{_number(score['low'], sign)} to {_number(score['high'], sign)}"
