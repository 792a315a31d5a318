"""``diptych export``: a run or checkpoint in the format of another library."""

import argparse
import sys
from typing import Any

EPILOG = """example:
  diptych export runs/demo-pretrain --to open_clip -o exports/demo
  diptych export runs/demo-match --to torch_export -o exports/match --head gated
  diptych export runs/demo-match --to onnx -o exports/match-onnx
"""


def add_parser(subparsers: Any) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser(
        "export",
        help="a run or checkpoint for open_clip, transformers, torch.export or onnxruntime",
        description="Write a model to a folder that another library loads: open_clip (encoders, as "
        "local-dir:), hf (encoders, as transformers' CLIPModel), torch_export or onnx (encoders, head and "
        "calibration of a fine-tuning run as one program). What is written is compared with the model; if it "
        "differs by more than 1e-4, nothing is left.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "source",
        metavar="RUN_OR_CHECKPOINT",
        help="a fine-tuning or pretraining run, a checkpoint folder, or an open_clip model as ARCH:TAG",
    )
    parser.add_argument(
        "--to",
        required=True,
        choices=("open_clip", "hf", "torch_export", "onnx"),
        help="the format",
    )
    parser.add_argument("-o", "--out", required=True, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--head", default=None, help="which head of a fine-tuning run (default: the recommended one)"
    )
    parser.add_argument("--force", action="store_true", help="replace an earlier export in DIR")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Export, and say by how much the result differs."""
    from ..finetune.export.formats import export

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    found = export(args.source, args.to, args.out, head=args.head, force=args.force, say=say)
    for name, value in found.items():
        print(f"largest difference of {name}: {value:.1e}")
    print(f"wrote {args.out} ({args.to})")
    return 0
