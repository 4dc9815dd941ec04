"""The base model, its adapter, local training and what is published: the only place for torch and its family.

This file imports nothing heavy. It runs before any of its submodules, so it is also where the Hugging Face libraries are
told to stay off the network: a site connects to its aggregation server and to nothing else. (bitsandbytes, for one, asks
the hub for a compiled kernel while it is imported.)
"""

from __future__ import annotations

import logging
import os

for _name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
    os.environ.setdefault(_name, "1")
# Micro-batches differ in length: without this, memory falls to pieces that none of them fits into.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
# Threads that wait for each other sleep instead of spinning: beside other busy processes a step takes half the time or less;
# alone it took the same on one machine and 1.6 times as long on another (simulations/LOG.md). Torch reads it when it is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# It warns that this compiled kernel did not come, and computes the same without it.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
