"""The command `progtuning`, which `python -m progtuning` is too."""

import sys


def main() -> int:
    try:
        from progtuning.cli.command import main as command
    except KeyboardInterrupt:  # while the modules of the command are loaded
        print("progtuning: error: interrupted", file=sys.stderr)
        return 130
    return command()


if __name__ == "__main__":
    sys.exit(main())
