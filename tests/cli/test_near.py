"""What a message offers instead of what was typed: once, without words of a library, and of what is really there."""

import click
import pytest
import typer
from raising import raising

from fedlora.cli import main
from fedlora.cli.commands import app
from fedlora.core.errors import ConfigError, StoreError
from fedlora.core.plan import Plan
from fedlora.core.toml import parse_toml
from fedlora.lab.testing import toy_adapter, toy_plan
from fedlora.rounds.repair import ServerRepair
from fedlora.rounds.server import start_run
from fedlora.rounds.store import RunStore


def mistyped():
    """Each command of every group with its last two letters in the other order, and each long option without its last."""

    def walk(command, words):
        if isinstance(command, click.Group):
            for name, one in command.commands.items():
                yield [*words, name[:-2] + name[-1] + name[-2] + name[-1]]
                yield from walk(one, [*words, name])
        else:
            long = [o for p in command.params for o in p.opts if o.startswith("--") and len(o) > 6]
            yield from ([*words, one[:-1] + "qx"] for one in long)

    return list(walk(typer.main.get_command(app), []))


@pytest.mark.parametrize("words", mistyped(), ids=" ".join)
def test_what_may_be_meant_is_asked_once(words, capsys):
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith("error (usage): No such ")
    assert said.count("id you mean ") <= 1
    assert "(Did" not in said


def test_a_value_that_speaks_of_what_was_meant_is_quoted_whole(capsys):
    assert main(["site", "join", "--wait", "Did you mean 3? Did you mean 4?", "fl1:x"]) == 2
    assert "Did you mean 3? Did you mean 4?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[aggregate]\nname = "ffa"\n[lora]\nr = 4\n[server_optimizer]\nname = "adam"\n[protect]\nmode = "secagg"', ""),
        ("[federation]\nlocal_steps = 0", "federation: set either"),
        ("[model]\nload_in_4bit = true\nload_in_8bit = true", "model: load_in_4bit and load_in_8bit exclude each other"),
    ],
)
def test_what_is_wrong_with_a_whole_file_has_no_name_of_a_key_before_it(text, says):
    with raising(ConfigError, code="config") as e:
        parse_toml(text, Plan, name="plan.toml")
    assert str(e.value).startswith(f"plan.toml: {says}")
    assert "file:" not in str(e.value)


def test_a_name_without_a_run_is_told_of_the_runs_that_are_there(tmp_path):
    home = tmp_path / "study"
    (home / "runs").mkdir(parents=True)
    gone = home / "runs" / "clinicla"
    with raising(StoreError, code="store", match="no run in") as e:
        RunStore.open(gone)
    assert "start one with" in e.value.hint
    start_run(home / "runs" / "clinical", toy_plan(), toy_adapter())
    for opening in (lambda: RunStore.open(gone), lambda: ServerRepair(home, "clinicla")):
        with raising(StoreError, code="store") as e:
            opening()
        assert e.value.hint == f"did you mean {home / 'runs' / 'clinical'}?"
    with raising(StoreError, code="store") as e:
        RunStore.open(home / "runs" / "x")
    assert e.value.hint == "runs beside it: clinical"
