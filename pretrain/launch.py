"""torchrun for one machine that ends as its processes do.

``python -m diptych.pretrain.launch --nproc-per-node 2 -m diptych.pretrain CONFIG`` is torchrun's
``--standalone`` with the same arguments. torchrun itself answers Ctrl-C, and a mistake in a config that was
told in one sentence, with a traceback of its own, and a hang-up also under nohup.
"""

import logging
import os
import signal
import sys

__all__ = ["main"]


def main(arguments: list[str]) -> int:
    """Run torchrun with ``arguments`` and return an exit code: the first failed process's (128 + n for signal
    n), or 130 if torchrun was told to stop."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # torchrun would do the same, at length
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import get_args_parser
    from torch.distributed.run import main as torchrun

    for name in logging.root.manager.loggerDict:
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    known = "--signals-to-handle" in get_args_parser().format_help()  # since torch 2.9
    signals = ["--signals-to-handle", "SIGTERM,SIGINT,SIGQUIT"] if ignored and known else []
    try:
        torchrun(["--standalone", *signals, *arguments])
    except SignalException:
        return 130
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if code >= 0 else 128 - code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
