"""The command as people and programs meet it: help, exit statuses, errors with a way out, one JSON object."""

import json
import re
import stat
import subprocess
import sys

import pytest
from typer.main import get_command

from fedlora.cli import main
from fedlora.cli.commands import app
from fedlora.cli.output import Screen
from fedlora.formats.keys import PublicIdentity

COMMANDS = [
    ["version"],
    ["schema"],
    ["new", "plan"],
    ["new", "site"],
    ["new", "simulation"],
    ["keygen", "site"],
    ["keygen", "server"],
    ["check"],
    ["pin"],
    ["simulate"],
    ["report"],
    ["export"],
    ["inspect"],
    ["server", "up"],
    ["server", "start"],
    ["server", "repair"],
    ["site", "up"],
    ["site", "approve"],
    ["site", "repair"],
]


def answer(capsys):
    """The one JSON object on stdout."""
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_has_help_with_an_example_in_80_columns(words, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main([*words, "--help"]) == 0
    out = capsys.readouterr().out
    assert "Example: fedlora" in " ".join(out.split())
    assert max(map(len, out.splitlines())) <= 80
    assert "\x1b" not in out


def commands(command, *words):
    """The words of every command below this one, with its arguments and options."""
    for name, below in getattr(command, "commands", {}).items():
        yield from commands(below, *words, name)
    if not hasattr(command, "commands"):
        yield words, command.params


def test_help_explains_every_argument_and_option_once(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for words, parameters in commands(get_command(app)):
        assert main([*words, "--help"]) == 0
        out = capsys.readouterr().out
        assert "\\[" not in out
        for p in parameters:
            name = max(p.opts, key=len) if p.param_type_name == "option" else p.name.upper()
            lines = [line for line in out.splitlines() if re.match(rf"  (-., )?\[?{name}\b", line)]
            assert len(lines) == 1, (words, name)
            assert re.search(r"\S  +(?!\[)\S", lines[0]), f"{words}: {lines[0]}"


@pytest.mark.parametrize("kind", ["plan", "simulation"])
def test_what_new_prints_passes_check(kind, tmp_path, capsys):
    main(["new", kind])
    plan = tmp_path / "plan.toml"
    plan.write_text(capsys.readouterr().out)
    assert main(["check", str(plan)]) == 0
    assert "rounds" in capsys.readouterr().out


def test_check_names_every_wrong_key_at_once_with_a_suggestion(tmp_path, capsys):
    plan = tmp_path / "plan.toml"
    plan.write_text('[lora]\nrank = 8\nlora_alfa = 3\n[training]\nmax_steps = 5\n[protect]\nmode = "plain"\n')
    assert main(["check", str(plan)]) == 3
    error = capsys.readouterr().err
    assert "lora_alpha" in error  # the suggestion
    assert "rank" in error
    assert "local_steps" in error  # the right key instead of max_steps
    assert "protect.mode" in error  # plain is for tests: no plan can ask for it


def test_an_error_is_one_json_object_for_programs_and_two_lines_for_people(tmp_path, capsys):
    missing = str(tmp_path / "none.toml")
    assert main(["check", missing, "--json"]) == 3
    out = capsys.readouterr()
    found = json.loads(out.out)
    assert found["ok"] is False
    assert found["error"]["code"]
    assert out.err.startswith("error: ")
    assert main(["check", missing]) == 3
    assert capsys.readouterr().out == ""


def test_a_wrong_option_is_a_usage_error():
    assert main(["check", "--nonsense"]) == 2
    assert main(["simulate", "x.toml", "--transport", "smoke"]) == 2
    assert main([]) in (0, 2)  # click's answer to no arguments is the help


def test_a_bug_has_its_own_exit_status_and_says_so(monkeypatch, capsys):
    import fedlora.formats.plans

    monkeypatch.setattr(fedlora.formats.plans, "load_plan", lambda path: 1 / 0)
    assert main(["check", "plan.toml"]) == 70
    assert "unexpected ZeroDivisionError" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("raised", "status", "said"),
    [
        (ModuleNotFoundError("No module named 'torch'", name="torch"), 3, "fedlora[train]"),
        (PermissionError(13, "Permission denied", "plan.toml"), 3, "plan.toml: Permission denied"),
        (OSError(28, "No space left on device"), 7, "free some disk space"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_what_the_world_does_is_no_bug(raised, status, said, monkeypatch, capsys):
    import fedlora.formats.plans

    def fails(path):
        raise raised

    monkeypatch.setattr(fedlora.formats.plans, "load_plan", fails)
    assert main(["check", "plan.toml", "--json"]) == status
    out = capsys.readouterr()
    assert said in out.err
    assert json.loads(out.out)["ok"] is False


def test_inspect_shows_no_values_of_a_list(tmp_path, capsys):
    (tmp_path / "x.json").write_text('["secret", {"a": 1}]')
    assert main(["inspect", str(tmp_path / "x.json")]) == 0
    assert "secret" not in capsys.readouterr().out


def test_keys_are_private_never_overwritten_and_never_printed(tmp_path, capsys):
    assert main(["keygen", "site", "st-marys", "--out", str(tmp_path), "--json"]) == 0
    found = answer(capsys)["data"]
    secret = tmp_path / "st-marys.key"
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "st-marys.node.key").stat().st_mode) == 0o600
    before = secret.read_bytes()
    assert main(["keygen", "site", "st-marys", "--out", str(tmp_path)]) == 3
    assert secret.read_bytes() == before
    out = capsys.readouterr()
    shown = json.dumps(found) + out.out + out.err
    assert not any(line and line in shown for line in before.decode().split("\n") if len(line) > 20)


@pytest.mark.parametrize("name", ["Server", "server", "a b", "", "-a", "../x", "x" * 99])
def test_a_bad_site_name_makes_no_file(name, tmp_path):
    assert main(["keygen", "site", "--out", str(tmp_path / "keys"), "--", name]) == 3
    assert not list(tmp_path.rglob("*"))


def test_a_server_directory_is_made_once(tmp_path, capsys):
    home = tmp_path / "study"
    assert main(["keygen", "server", str(home), "--host", "127.0.0.1", "--json"]) == 0
    public = PublicIdentity.parse((home / "server.pub").read_text())
    assert answer(capsys)["data"]["fingerprint"] == public.fingerprint()
    files = {str(p.relative_to(home)) for p in home.rglob("*") if p.is_file()}
    assert {"server.key", "server.pub", "tls/ca.crt", "superexec.secret"} <= files
    private = [p for p in home.rglob("*") if p.suffix in (".key", ".secret")]
    assert all(stat.S_IMODE(p.stat().st_mode) == 0o600 for p in private)
    assert main(["keygen", "server", str(home), "--host", "127.0.0.1"]) == 3


def test_inspect_says_what_a_file_is_and_refuses_others(tmp_path, capsys):
    main(["new", "plan"])
    plan = tmp_path / "plan.toml"
    plan.write_text(capsys.readouterr().out)
    assert main(["inspect", str(plan)]) == 0
    assert "kind: plan" in capsys.readouterr().out
    other = tmp_path / "other"
    other.write_bytes(b"\x00\xff" * 9)
    assert main(["inspect", str(other)]) == 3
    assert main(["inspect", str(tmp_path / "none")]) == 3
    assert "error:" in capsys.readouterr().err


def test_exporting_what_is_no_run_says_so(tmp_path, capsys):
    assert main(["export", str(tmp_path), str(tmp_path / "adapter")]) == 3
    assert not (tmp_path / "adapter").exists()
    assert "hint:" in capsys.readouterr().err


def test_output_is_piped_without_colors_or_bars():
    out = subprocess.run([sys.executable, "-m", "fedlora", "new", "plan"], capture_output=True, text=True, check=True)
    assert "\x1b" not in out.stdout
    assert out.stderr == ""


def test_progress_is_one_line_an_event_and_nothing_when_quiet(capsys):
    with Screen() as screen:
        screen("site-offline", {"site": "north"})
        screen("rejected", {"site": "north", "code": "late"})
        screen("update", {"site": "south", "weight": 3, "metrics": {}})
        screen("no-such-event", {})
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("s  ", 1)[1].strip() for line in lines] == [
        "north is offline",
        "north: not counted (late)",
        "south: weight 3, training loss -, held-out NLL -",
        "no-such-event: reported by another version of FedLoRA",
    ]
    with Screen(quiet=True) as screen:
        screen("site-offline", {"site": "north"})
    assert capsys.readouterr().err == ""
