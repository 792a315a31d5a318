"""``diptych data build`` and ``diptych data index``: shards made, or made of tars that are there."""

import argparse
import json

from .data_common import (
    counts,
    engine_arguments,
    fraction,
    limit_arguments,
    limits_of,
    positive,
    print_findings,
    progress,
)

BUILD = """example, from nothing:
  mkdir -p pics
  python -c "from PIL.Image import new; \
[new('RGB', (64, 64), c).save(f'pics/{c}.png') for c in ('red', 'blue')]"
  printf 'image,caption,mood\\nred.png,a red square,warm\\n' > pics/captions.csv
  printf 'blue.png,a blue square,cold\\n' >> pics/captions.csv
  diptych data build pics/captions.csv --out my-shards

A table (.csv, .tsv, .jsonl, .parquet) has a column of image paths or bytes and one or several columns of
captions; further columns go into each sample's JSON. A folder has NAME.txt or NAME.json beside each image.
Tars, or a folder of them, are sharded anew. A build that was stopped goes on with the same command."""

INDEX = """example:
  diptych data index cc3m-shards
  diptych data index laion-shards --caption-key caption

The tars may come from webdataset, img2dataset or open_clip's users. They are read once and not changed. The
same command adds tars that came since, and goes on where it was stopped."""


def build_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of build."""
    parser.add_argument("source", nargs="+", help="a table, a folder of images, a tar, or a folder of tars")
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder of shards to make")
    parser.add_argument("--image", metavar="COLUMN", help="column of paths or bytes (default: found by name)")
    parser.add_argument(
        "--caption",
        metavar="COLUMN",
        action="append",
        help="column of captions, or of tars the key of the JSON (default: found by name); given several "
        "times, the first with text is the caption and all are kept as `captions`",
    )
    parser.add_argument(
        "--key", metavar="COLUMN", help="column that names the samples (default: their number)"
    )
    parser.add_argument(
        "--prefix-keys", action="store_true", help="put a tar's name before its keys, where they repeat"
    )
    parser.add_argument(
        "--root",
        metavar="DIR",
        help="the folder that image paths are relative to and must stay inside (default: the table's)",
    )
    parser.add_argument("--samples-per-shard", type=positive, default=1000, metavar="N", help="default: 1000")
    parser.add_argument(
        "--val-fraction",
        type=fraction,
        default=0.0,
        metavar="X",
        help="hold this share of the images back: makes DIR/train and DIR/val (default: 0)",
    )
    parser.add_argument(
        "--image-size",
        type=positive,
        metavar="PIXELS",
        help="make images smaller whose shorter side is longer than this (default: as they are)",
    )
    parser.add_argument(
        "--format", choices=["jpg", "png", "webp"], help="write images in this format (default: as they are)"
    )
    parser.add_argument(
        "--quality",
        type=positive,
        metavar="Q",
        help="write every JPEG and WebP anew at this quality, 1 to 100 (default: 95 for those that must be)",
    )
    parser.add_argument(
        "--max-bad-fraction",
        type=fraction,
        default=0.01,
        metavar="X",
        help="stop if more of the rows are bad (default: 0.01)",
    )
    limit_arguments(parser)
    parser.add_argument("--no-decode", action="store_true", help="check the headers of images only")
    parser.add_argument("--overwrite", action="store_true", help="replace the shards that are there")
    engine_arguments(parser)


def index_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of index."""
    parser.add_argument("folder", help="a folder of .tar files")
    parser.add_argument(
        "--caption-key", metavar="KEY", help="captions are under this key of the JSON, not in .txt"
    )
    limit_arguments(parser)
    parser.add_argument("--overwrite", action="store_true", help="index all tars again")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    engine_arguments(parser)


def build(args: argparse.Namespace) -> int:
    """Build shards and say what became of the rows."""
    from ..data.build import build_shards
    from ..data.recode import Recode
    from ..data.sources import Columns

    report = build_shards(
        args.source,
        args.out,
        columns=Columns(args.image, args.caption, args.key, args.prefix_keys),
        root=args.root,
        samples_per_shard=args.samples_per_shard,
        val_fraction=args.val_fraction,
        max_bad_fraction=args.max_bad_fraction,
        decode=not args.no_decode,
        recode=Recode(args.image_size, args.format, args.quality),
        limits=limits_of(args),
        overwrite=args.overwrite,
        workers=args.workers,
        engine=args.engine,
        progress=progress,
    )
    print_findings(
        f"{bad['source']}: row {bad['row']}: {bad['reason']}: {bad['detail']}" for bad in report.bad
    )
    if report.kept:
        print(f"{report.kept} of {report.rows} rows were finished by a build that was stopped, and are kept")
    if report.anew:
        print(
            f"{report.anew} rows of a build that was stopped are made anew: they or the settings have changed"
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
        limits=limits_of(args),
        workers=args.workers,
        engine=args.engine,
        progress=progress,
    )
    good, bad = sum(row.num_ok for row in report.rows), sum(row.num_bad for row in report.rows)
    if args.json:
        rows = [asdict(row) for row in report.rows]
        found = [asdict(finding) for finding in report.findings]
        figures = {"samples": good, "bad": bad, "kept": report.kept, "reasons": report.reasons}
        print(json.dumps(figures | {"shards": rows, "findings": found}))
        return 0
    print_findings(map(str, report.findings))
    if report.kept:
        print(f"{report.kept} of {len(report.rows)} shards were indexed before, and are kept")
    print(f"indexed {good} samples in {len(report.rows)} shards in {args.folder}")
    if report.findings:
        print(f"left out {bad} samples, named in {args.folder}/index_report.json ({counts(report.reasons)})")
    return 0
