"""``python -m fedlora``, and the command ``fedlora``."""

import sys


def run() -> int:
    """The command, of which a Ctrl-C ends the imports, too, without a traceback."""
    try:
        from fedlora.cli import main

        return main()
    except KeyboardInterrupt:
        sys.stderr.write("error (interrupted): interrupted\n")
        return 130


if __name__ == "__main__":
    sys.exit(run())
