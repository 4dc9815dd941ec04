"""A port that the server cannot have is said with a way out."""

from __future__ import annotations

import socket

import pytest

from fedlora.core.errors import ConfigError
from fedlora.flower.server import _check_free


def test_a_taken_port_and_a_foreign_address_have_a_way_out():
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ConfigError, match="Address already in use") as e:
        _check_free(f"127.0.0.1:{taken.getsockname()[1]}")
    assert "`fedlora server up`, listens there" in e.value.hint
    with pytest.raises(ConfigError, match="Cannot assign requested address") as e:
        _check_free("192.0.2.1:8443")
    assert "an address of this host" in e.value.hint
