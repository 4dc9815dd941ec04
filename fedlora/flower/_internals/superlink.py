"""Flower's command ``flower-superlink``, as it is."""

from __future__ import annotations

from fedlora.processes.imports import without_collecting

with without_collecting():
    from flwr.superlink.cli import flower_superlink as flower_superlink
