"""Flower's public names: every other file of this folder takes them from here, so that nothing searches for garbage meanwhile."""

from __future__ import annotations

from fedlora.processes.imports import without_collecting

with without_collecting():
    from flwr.app import Array as Array
    from flwr.app import ArrayRecord as ArrayRecord
    from flwr.app import ConfigRecord as ConfigRecord
    from flwr.app import Message as Message
    from flwr.app import RecordDict as RecordDict
    from flwr.clientapp import ClientApp as ClientApp
    from flwr.serverapp import ServerApp as ServerApp
