"""``diptych data verify``: what is wrong with shards, and what of them also stands in an evaluation set."""

import argparse
import json

from .data_common import counts, engine_arguments, limit_arguments, limits_of, print_findings, progress

VERIFY = """example:
  diptych data verify my-shards
  diptych data verify my-shards --decode --json > verify.json
  diptych data verify my-shards --against my-eval --write-filter drop.parquet

Exit code 0: all is well; 1: something is wrong, and named. With --against, what is named are the samples
whose image or caption also stands in an evaluation set; a training leaves them out with
'data.train=[{data: my-shards, drop: drop.parquet}]'."""

MATCHES, MAX_DISTANCE = ("image", "similar-image", "caption"), 6  # those of data.overlap, which loads numpy


def verify_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of verify."""
    parser.add_argument("folder", help="a folder of shards, or of .tar files without an index")
    parser.add_argument("--decode", action="store_true", help="decode every image in full")
    parser.add_argument(
        "--duplicates", action="store_true", help="images that are there several times are faults"
    )
    limit_arguments(parser)
    parser.add_argument(
        "--against",
        metavar="DIR",
        action="append",
        help="shards of an evaluation set (may be given several times): look for their samples, and for "
        "nothing else",
    )
    parser.add_argument(
        "--match",
        metavar="WHAT",
        nargs="+",
        choices=MATCHES,
        default=MATCHES,
        help=f"what is compared with --against: {', '.join(MATCHES)} (default: all)",
    )
    parser.add_argument(
        "--max-distance",
        type=int,
        choices=range(0, 17),
        default=MAX_DISTANCE,
        metavar="BITS",
        help=f"bits of 64 by which a similar image's hash may differ, 0 to 16 (default: {MAX_DISTANCE})",
    )
    parser.add_argument(
        "--write-filter", metavar="PARQUET", help="write what --against finds as a filter, a source's `drop`"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    engine_arguments(parser)


def verify(args: argparse.Namespace) -> int:
    """Verify shards; 1 if anything is wrong."""
    from ..configs.errors import UserError

    if args.against:
        return _overlap(args)
    if args.write_filter is not None:
        raise UserError("--write-filter needs --against EVALUATION_SHARDS")
    from ..data.verify import verify_folder

    report = verify_folder(
        args.folder,
        decode=args.decode,
        duplicates=args.duplicates,
        limits=limits_of(args),
        workers=args.workers,
        engine=args.engine,
        progress=progress,
    )
    if args.json:
        print(json.dumps(report.to_json()))
        return 1 if report.findings else 0
    print_findings(map(str, report.findings))
    for note in report.notes:
        print(f"note: {note}")
    state = f"{len(report.findings)} faults ({counts(report.reasons)})" if report.findings else "all is well"
    print(f"verified {report.samples} usable samples in {report.shards} shards in {report.folder}: {state}")
    return 1 if report.findings else 0


def _overlap(args: argparse.Namespace) -> int:
    from ..data.overlap import find_overlap

    report = find_overlap(
        args.folder,
        args.against,
        match=args.match,
        max_distance=args.max_distance,
        write_filter=args.write_filter,
        max_pixels=limits_of(args).max_pixels,
        workers=args.workers,
        engine=args.engine,
        progress=progress,
    )
    if args.json:
        print(json.dumps(report.to_json()))
        return 1 if report.matched else 0
    every = sum(report.reasons.values())
    print_findings(map(str, report.findings), every - len(report.findings))
    if report.unread:
        print(f"note: {report.unread} samples are damaged; of them only the images' bytes were compared")
    state = f"{report.matched} also stand there ({counts(report.reasons)})" if every else "none stands there"
    print(f"compared {report.samples} samples of {args.folder} with {', '.join(args.against)}: {state}")
    if args.write_filter is not None:
        sources = f"data.train=[{{data: {args.folder}, drop: {args.write_filter}}}]"
        print(f"wrote {args.write_filter}; train without them with '{sources}'")
    return 1 if report.matched else 0
