"""What holds for every test."""

from __future__ import annotations

import sys
from collections.abc import Generator
from typing import Any

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Generator[None, Any, Any]:
    """A test, its fixtures of any scope included, leaves torch's number of threads as it was.

    A base or a worker sets it for the whole process, and sums of float32 depend on it, in later tests too.
    """
    torch = sys.modules.get("torch")
    before = torch.get_num_threads() if torch else 0
    done = yield
    if torch:
        torch.set_num_threads(before)
    return done
