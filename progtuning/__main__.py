"""`python -m progtuning` is the command `progtuning`."""

import sys

from progtuning.cli.command import main

if __name__ == "__main__":
    sys.exit(main())
