"""``python -m diptych.cli``: the ``diptych`` command by module."""

import sys

from .main import main

if __name__ == "__main__":
    sys.exit(main())
