"""``torchrun -m diptych.pretrain CONFIG [key=value ...]``: one process of a run, for any launcher.

It is ``diptych pretrain`` by another name; the command line is looked up when it runs, since nothing in
``pretrain`` depends on ``cli``.
"""

import sys
from importlib import import_module

from ..configs.leave import leave

if __name__ == "__main__":
    leave(import_module("diptych.cli.main").main(["pretrain", *sys.argv[1:]]))
