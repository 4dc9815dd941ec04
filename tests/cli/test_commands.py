"""The command as people and programs meet it: help, exit statuses, errors with a way out, one JSON object."""

import json
import re
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.main import get_command

from fedlora.cli import main
from fedlora.cli.commands import app
from fedlora.cli.explain import STATUSES, meanings
from fedlora.cli.help import SECTIONS
from fedlora.cli.output import Screen, fail
from fedlora.core.codes import CODES, exit_status
from fedlora.doctor.findings import FAULTS
from fedlora.flower import records
from fedlora.formats.keys import PublicIdentity
from fedlora.processes.causes import CAUSES

COMMANDS = [
    ["version"],
    ["schema"],
    ["explain"],
    ["docs"],
    ["new", "plan"],
    ["new", "site"],
    ["new", "simulation"],
    ["keygen", "site"],
    ["server", "init"],
    ["check"],
    ["pin"],
    ["simulate"],
    ["report"],
    ["export"],
    ["inspect"],
    ["server", "up"],
    ["server", "start"],
    ["server", "attach"],
    ["server", "status"],
    ["server", "watch"],
    ["server", "stop"],
    ["server", "pause"],
    ["server", "resume"],
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


def test_every_command_stands_once_under_the_one_who_uses_it_with_a_whole_sentence(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    listed = [name for names in SECTIONS.values() for name in names]
    assert sorted(listed) == sorted(get_command(app).commands)
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    at = [out.index(f"\n{title}:\n") for title in SECTIONS]
    assert at == sorted(at)
    assert "..." not in out.partition("To begin:")[2]
    assert "\nCommands:" not in out


def test_a_command_that_stands_in_no_section_is_listed_all_the_same(capsys, monkeypatch):
    monkeypatch.setitem(SECTIONS, "To begin", ("new",))
    assert main(["--help"]) == 0
    assert "\n  keygen " in capsys.readouterr().out.partition("\nCommands:\n")[2]


def test_the_help_lists_the_exit_statuses_that_errors_have(capsys):
    assert main(["--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert all(f"{status} {meaning}" in said for status, meaning in STATUSES.items())
    assert {exit_status(code) for code in CODES} <= set(STATUSES)


def test_the_version_is_an_option_too(capsys):
    said = []
    for words in (["--version"], ["version"]):
        assert main(words) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    assert said[0].startswith("fedlora ")


def words_of_records():
    """Every word that stands for an error, or for why a site is not in a round."""
    return {
        *CODES,
        *records._FLOWER_ERRORS.values(),
        "flower",
        "late",
        "offline",
        "not-drawn",
        "site-stopped",
        "os",
        "usage",
        "bug",
        *FAULTS,  # what `site doctor` and `site up` print in brackets
        *CAUSES,
    }


@pytest.mark.parametrize("code", sorted(words_of_records()))
def test_each_code_is_explained_by_what_it_means_and_what_to_do(code, capsys):
    assert main(["explain", code]) == 0
    meaning, cure, *_ = capsys.readouterr().out.splitlines()
    assert meaning.endswith(".")
    assert cure.endswith(".")
    assert meaning != cure
    assert "?" not in meaning + cure  # a fact that nobody filled in


@pytest.mark.parametrize("code", sorted(meanings()))
def test_a_whole_error_is_explained_as_its_code_is(code, capsys):
    """Pasted from a screen, with its hint and its place, in one word or in several."""
    main(["explain", code])
    said = capsys.readouterr().out
    fail("rows.csv: it has no such thing", hint="see `fedlora check`", code=code, status=3)
    pasted = capsys.readouterr().err
    for words in (
        [pasted],
        [f"    12.3 s  {pasted.splitlines()[0]}"],
        pasted.split(),
        [f"({code})"],
        [f"{code}:"],
        [code.upper()],
    ):
        assert main(["explain", *words]) == 0
        assert capsys.readouterr().out.removeprefix(f"{code}:\n") == said


@pytest.mark.parametrize("code", sorted(meanings()))
def test_a_code_with_a_letter_wrong_names_the_right_one(code, capsys):
    if len(code) < 6:
        return  # of so few letters one says little
    for wrong in (code[:-1], f"{code}s", code[0] + code[2:], code.replace(code[3], "x", 1)):
        if wrong in meanings():
            continue
        assert main(["explain", wrong]) == 3
        assert code in capsys.readouterr().err.partition("hint: ")[2]


def test_a_word_that_no_code_is_spelled_like_names_those_that_share_a_part(capsys):
    assert main(["explain", "some-base-which-is-wrong"]) == 3
    assert "did you mean wrong-base or" in capsys.readouterr().err
    assert main(["explain", "it does not work"]) == 3
    assert "`fedlora explain` lists all" in capsys.readouterr().err


def test_an_error_names_its_code_and_an_unknown_one_its_neighbor(capsys):
    assert main(["explain", "wrong-bas"]) == 3
    assert capsys.readouterr().err.splitlines() == [
        "error (config): there is no code 'wrong-bas'",
        "hint: did you mean wrong-base?",
    ]
    assert set(meanings()) == {*words_of_records(), "interrupted", "declined"}


@pytest.mark.parametrize("kind", ["plan", "plan --all", "simulation"])
def test_what_new_prints_passes_check(kind, tmp_path, capsys):
    main(["new", *kind.split()])
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
    assert out.err.startswith("error (")
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
    import fedlora.cli.terminal
    import fedlora.formats.plans

    def fails(path):
        raise raised

    monkeypatch.setattr(fedlora.formats.plans, "load_plan", fails)
    monkeypatch.setattr("fedlora.cli.terminal.READER_GONE", [True])  # of a command before, in a program that runs several
    monkeypatch.setattr("fedlora.cli.READER_GONE", fedlora.cli.terminal.READER_GONE)
    assert main(["check", "plan.toml", "--json"]) == status
    out = capsys.readouterr()
    assert said in out.err
    assert json.loads(out.out)["ok"] is False


PRESSED = """
import importlib, sys, tomllib

class Pressed:
    def find_spec(self, name, path=None, target=None):
        if name == pressed:
            raise KeyboardInterrupt

pressed = sys.argv[1]
sys.meta_path.insert(0, Pressed())
module, _, function = tomllib.load(open(sys.argv[2], "rb"))["project"]["scripts"]["fedlora"].partition(":")
sys.argv[1:] = ["docs"]
sys.exit(getattr(importlib.import_module(module), function)())
"""


@pytest.mark.parametrize("module", ["fedlora.cli.output", "typer", "fedlora.cli.commands", "fedlora.cli.help"])
def test_a_ctrl_c_while_the_command_itself_is_imported_is_no_traceback(module):
    project = Path(__file__).resolve().parents[2] / "pyproject.toml"
    done = subprocess.run([sys.executable, "-c", PRESSED, module, str(project)], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "error (interrupted): interrupted\n")


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
    assert main(["server", "init", str(home), "--host", "127.0.0.1", "--json"]) == 0
    public = PublicIdentity.parse((home / "server.pub").read_text())
    assert answer(capsys)["data"]["fingerprint"] == public.fingerprint()
    files = {str(p.relative_to(home)) for p in home.rglob("*") if p.is_file()}
    assert {"server.key", "server.pub", "tls/ca.crt", "superexec.secret"} <= files
    private = [p for p in home.rglob("*") if p.suffix in (".key", ".secret")]
    assert all(stat.S_IMODE(p.stat().st_mode) == 0o600 for p in private)
    assert main(["server", "init", str(home), "--host", "127.0.0.1"]) == 3


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
    assert "error (" in capsys.readouterr().err


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
        for kind in ("train", "evaluate"):
            screen("ask", {"round": 7, "attempt": 0, "kind": kind, "sites": ["north"], "need": 1})
        screen("no-such-event", {})
        screen("waiting", {"sites": [], "need": 2, "missing": ["north", "south"]})
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("s  ", 1)[1].strip() for line in lines] == [
        "north is offline",
        "north: not counted (late)",
        "south: weight 3, training loss -, held-out NLL -",
        "round 7: asking north",
        "last evaluation: asking north",
        "no-such-event: reported by another version of FedLoRA",
        "waiting for sites: 2 needed, now none; missing: north, south",
    ]
    with Screen(quiet=True) as screen:
        screen("site-offline", {"site": "north"})
    assert capsys.readouterr().err == ""


def test_who_waits_for_a_base_is_told_so_until_something_else_is_said(capsys, monkeypatch):
    monkeypatch.setattr("fedlora.lab.progress.pulse.SILENCE_S", 0.01)
    for quiet in (False, True):
        with Screen(quiet=quiet) as screen:
            screen("load", {"model": "m"})
            said, end = "", time.monotonic() + (0.1 if quiet else 20)
            while said.count("still loading m") < 2 and time.monotonic() < end:
                time.sleep(0.01)
                said += capsys.readouterr().err
            assert (said.count("still loading m") >= 2) is not quiet
            screen("site-offline", {"site": "north"})
            time.sleep(0.05)  # a line that was on its way
            capsys.readouterr()
            time.sleep(0.05)
            assert capsys.readouterr().err == ""
