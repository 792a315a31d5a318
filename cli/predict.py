"""``diptych predict``: answers of a fine-tuned run for a table."""

import argparse
import sys
from pathlib import Path
from typing import Any

EPILOG = """example:
  diptych predict runs/demo-match my.csv -o answers.csv
  diptych predict runs/demo-match my.parquet -o answers.parquet --head bilinear
  diptych predict runs/demo-match my.csv -o answers.csv --explain
  diptych predict runs/demo-match pictures --format folders -o answers.csv
"""


def add_parser(subparsers: Any) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser(
        "predict",
        help="classes and probabilities for the rows of a table",
        description="Answer every row of a table (CSV, TSV, JSONL or Parquet), of WebDataset shards or of a "
        "folder of pictures with the columns that the run was fine-tuned on. A cell may be empty, and a "
        "whole column absent: then the other modality answers. Rows are answered as they are read, so a "
        "table may be larger than memory.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_folder", metavar="RUN", help="a folder of diptych finetune")
    parser.add_argument("table", metavar="IN", help="a table, a tar, or a folder (see --format)")
    parser.add_argument(
        "--format",
        default=None,
        choices=("table", "shards", "folders"),
        help="what IN is; a folder may be shards, that is tars of samples, or folders of pictures",
    )
    parser.add_argument("-o", "--out", required=True, help="file to write: .csv, .tsv, .jsonl or .parquet")
    parser.add_argument("--head", default=None, help="which head answers (default: the recommended one)")
    parser.add_argument(
        "--explain",
        action="store_true",
        help="also how much each modality moved the answer: columns phi_MODALITY, and weight_MODALITY of "
        "heads that weigh",
    )
    parser.add_argument(
        "--root", default=None, help="folder that image paths may not leave (default: the table's)"
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Predict and write the answers."""
    from ..configs.files import resolve_data_path
    from ..finetune.answers import answer_table, check_out
    from ..finetune.predictor import Predictor
    from .progress import progress

    out = Path(args.out)
    check_out(out)
    predictor = Predictor.load(args.run_folder, head=args.head, device=args.device)
    rows = answer_table(
        predictor,
        args.table,
        out,
        form=args.format,
        root=resolve_data_path(args.root) if args.root else None,
        explain=args.explain,
        say=lambda text: print(text, file=sys.stderr, flush=True),
        progress=progress,
    )
    print(f"wrote {out} ({rows} rows, head {predictor.head})")
    return 0
