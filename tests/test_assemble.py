"""Files that do not belong together are refused before anything is opened to the network or loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedlora import assemble
from fedlora.core.errors import ConfigError, KeyFileError
from fedlora.core.tables.simulation import Simulation
from fedlora.core.toml import dump_toml
from fedlora.flower.enrol import make_server_home, make_site_keys
from fedlora.formats.files import save_adapter
from fedlora.formats.keys import Identity
from fedlora.lab.testing import toy_adapter, toy_plan
from fedlora.rounds.server import load_server_key
from fedlora.site.site_file import SiteFile


def silent(event: str, facts: object) -> None:
    """Nobody is told."""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A server with one site, and a plan beside it."""
    make_server_home(tmp_path / "home", hosts=["127.0.0.1"])
    make_site_keys("a", tmp_path / "home" / "sites")
    return tmp_path / "home"


def test_the_key_of_another_site_is_refused(home: Path):
    make_site_keys("a", home / "keys")
    (home / "site.toml").write_text(dump_toml(SiteFile(name="a", key="keys/a.key", server_key="server.pub")))
    assert assemble.site(home / "site.toml", report=silent).name == "a"
    (home / "site.toml").write_text(dump_toml(SiteFile(name="b", key="keys/a.key", server_key="server.pub")))
    with pytest.raises(KeyFileError, match=r"is the key of 'a', the site file says 'b'"):
        assemble.site(home / "site.toml", report=silent)


@pytest.mark.parametrize("name", ["server", "a"])
def test_a_server_does_not_run_with_another_key_than_sites_pin(home: Path, name: str):
    load_server_key(home)
    if name != "server":
        (home / "server.pub").unlink()
    (home / "server.key").unlink()
    Identity.generate(name).save(home / "server.key")
    with pytest.raises(KeyFileError, match="not the key whose public half"):
        load_server_key(home)


def test_a_run_is_made_or_gone_on_with_and_never_of_a_simulations_plan(home: Path, tmp_path: Path):
    plan, file = toy_plan(min_sites=1), tmp_path / "plan.toml"
    save_adapter(tmp_path / "first.safetensors", toy_adapter(), {"round": 0, "plan": plan.digest()})
    file.write_text(dump_toml(plan.model_copy(update={"simulation": Simulation()})))
    with pytest.raises(ConfigError, match="not for a deployment"):
        assemble.server(home, file, resume=False, report=silent)
    assert not list((home / "runs").iterdir())
    file.write_text(dump_toml(plan.model_copy(update={"lora": plan.lora.model_copy(update={"init_digest": ""})})))
    with pytest.raises(ConfigError, match="is not pinned") as refused:
        assemble.server(home, file, resume=False, report=silent)
    assert "fedlora pin" in refused.value.hint
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "plan.toml").write_text(dump_toml(plan))
    with pytest.raises(ConfigError, match=r"first.safetensors is not there"):
        assemble.server(home, tmp_path / "elsewhere" / "plan.toml", resume=False, report=silent)
    assert not list((home / "runs").iterdir())
    file.write_text(dump_toml(plan))
    made = assemble.server(home, file, resume=False, report=silent)
    assert set(made.sites) == {"a"}
    assert assemble.server(home, file, resume=True, report=silent).store.run == made.store.run
