"""``diptych report``: one HTML page for the runs."""

import argparse
from typing import Any

EPILOG = """example:
  diptych report runs/demo-pretrain runs/demo-finetune-match --out report.html
"""


def add_parser(subparsers: Any) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser(
        "report",
        help="one self-contained HTML page of scores, curves and pictures",
        description="Write one HTML file for a pretraining run and a fine-tuning run: scores with chance and "
        "intervals, curves, example retrievals, the fusion table, settings. It needs no server "
        "and no network.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="*", help="run folders (default: the newest ones in runs/)")
    parser.add_argument(
        "--out", default=None, help="the file to write (default: report.html in the first run)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the page and print its path."""
    from ..finetune.report.page import write_report

    print(write_report(args.runs, args.out))
    return 0
