"""The files that an operator installs keep what the rest relies on."""

from __future__ import annotations

import configparser
from pathlib import Path

import yaml
from flower.harness import ROOT


def unit(path: Path) -> configparser.SectionProxy:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str
    parser.read(path)
    return parser["Service"]


def test_the_sites_unit_restarts_for_ever_and_not_every_second():
    service = unit(ROOT / "client" / "fedlora-site.service")
    assert service["Restart"] == "always"
    assert float(service["RestartSec"]) >= 10
    assert "StartLimitIntervalSec=0" in (ROOT / "client" / "fedlora-site.service").read_text()


def test_the_sites_unit_may_write_its_state_only_and_become_nothing_else():
    service = unit(ROOT / "client" / "fedlora-site.service")
    assert service["ProtectSystem"] == "strict"
    assert service["NoNewPrivileges"] == "true"
    assert service["CapabilityBoundingSet"] == ""
    assert service["StateDirectory"] == "fedlora"
    assert "/srv/fedlora" in service["ReadOnlyPaths"].split()
    assert "ReadWritePaths" not in service


def test_the_servers_container_publishes_the_gateway_alone_and_on_no_host_network():
    services = yaml.safe_load((ROOT / "server" / "compose.yaml").read_text())["services"]
    (server,) = services.values()
    assert server["ports"] == ["${FEDLORA_PORT:-8443}:8443"]
    assert "network_mode" not in server
    assert server["command"][:3] == ["fedlora", "server", "up"]
    assert server["command"][-1].endswith(":8443")
    assert (server["read_only"], server["cap_drop"], server["security_opt"]) == (True, ["ALL"], ["no-new-privileges:true"])
