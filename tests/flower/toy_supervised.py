"""Supervises one process that has a child of its own, until killed: python toy_supervised.py LOG_DIRECTORY."""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path

from fedlora.processes.supervisor import Service, Supervisor

if __name__ == "__main__":
    script = "import subprocess, time; subprocess.Popen(['sleep', '300']); print('up', flush=True); time.sleep(300)"
    service = Service("sleeper", [sys.executable, "-c", script], dict(os.environ), ready=lambda: True)
    supervisor = Supervisor([service], log_directory=Path(sys.argv[1]), report=lambda e, f: None)
    supervisor.start()
    print(json.dumps(["pids", supervisor.pids()]), flush=True)
    supervisor.watch(threading.Event())
