"""What holds for every test."""

from __future__ import annotations

import sys
from collections.abc import Generator
from typing import Any

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, Any]:
    """A test, its fixtures of any scope included, leaves torch's number of threads as it was.

    A base or a worker sets it for the whole process, and sums of float32 depend on it, in later tests too. Where torch is not
    needed it is not imported: the quick tier runs without it.
    """
    if item.get_closest_marker("torch"):
        import torch
    elif "torch" in sys.modules:
        torch = sys.modules["torch"]
    else:
        return (yield)
    before = torch.get_num_threads()
    done = yield
    torch.set_num_threads(before)
    return done
