"""Same as `fedlora simulate`; `python simulations/run.py demo` prepares the clinical demo first and shows what it brought."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main() -> int:
    if sys.argv[1:2] == ["demo"]:
        sys.path.insert(0, str(HERE))
        from demo import demo

        return demo(HERE.parent, resume="--resume" in sys.argv)
    from fedlora.cli import main as fedlora

    return fedlora(["simulate", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
