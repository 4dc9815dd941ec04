"""What is published: a PEFT directory that other programs load, files for llama.cpp, or the adapter merged into its base."""

from __future__ import annotations

from fedlora.learn.export.adapter import export_adapter
from fedlora.learn.export.merged import merge

__all__ = ["export_adapter", "merge"]
