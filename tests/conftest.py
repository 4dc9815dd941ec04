"""How tests are spread over processes (``pytest -n``): a file stays whole, and what opens ports runs in one of them."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A port that is free when it is looked for must still be free a moment later."""
    with_ports = {item.path for item in items if item.get_closest_marker("flower")}
    for item in items:
        item.add_marker(pytest.mark.xdist_group("ports" if item.path in with_ports else str(item.path)))
