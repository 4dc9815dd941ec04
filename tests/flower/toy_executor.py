"""The executor, told to start the toy server app."""

from __future__ import annotations

import sys
from pathlib import Path

from fedlora.flower.executor import main

if __name__ == "__main__":
    main(app=[sys.executable, str(Path(__file__).with_name("toy_server_app.py"))])
