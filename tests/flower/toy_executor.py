"""The executor, told to start the toy server app, and to keep from claiming while a test asks for it.

A signal that stops the process would come too late for a claim that is on its way: the relay may answer it after the test's run
has begun, to a process that no longer hears.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from fedlora.flower import executor
from fedlora.flower._internals import Claimer

HOLD, HELD = "toy.hold", "toy.held"


class _Held(Claimer):
    """Claims nothing while ``HOLD`` lies in the home, and says so with ``HELD``."""

    def claim(self) -> str:
        home = Path(sys.argv[sys.argv.index("--home") + 1])
        while (home / HOLD).exists():
            (home / HELD).touch()
            time.sleep(0.05)
        return super().claim()


if __name__ == "__main__":
    executor.Claimer = _Held  # type: ignore[misc]
    executor.main(app=[sys.executable, str(Path(__file__).with_name("toy_server_app.py"))])
