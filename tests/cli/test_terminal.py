"""What any command prints: nothing from a file, a name or a server moves the cursor, or begins a line that looks like ours."""

import contextlib
import io
import itertools
import json
import logging
import os
import re
import shutil
import sys
import tomllib
import warnings

import click
import pytest
import tomlkit
import typer
from cli.test_schema import CASES, COMMANDS, study  # noqa: F401  # a fixture

from fedlora.cli import main
from fedlora.cli.output import Screen, emit, fail
from fedlora.cli.terminal import Guarded, guarded
from fedlora.core.events import Event
from fedlora.flower.enrol import make_server_home
from fedlora.formats.files import save_adapter
from fedlora.formats.keys import load_identity
from fedlora.formats.published.statement import FILE, Statement, sign
from fedlora.lab.testing import toy_adapter

FORGED = "FORGED\r\x1b[2J\x1b[H\x9b8m\x7f\x85\u2028\u2029\u202a\u202e\u2066\u2069\u200b\nFORGED: none"
NAMES = f"{FORGED}\nerror (data): FALSE"


@pytest.fixture
def printed(capsys):
    """Runs a command and checks what it has printed, for people or for programs; what a bug would be is one."""

    def run(*words):
        capsys.readouterr()
        status = main([str(w) for w in words])
        said = capsys.readouterr()
        assert status != 70, (words, said.err)
        check(said.out + said.err)
        return status, said

    return run


def check(text):
    assert all(c.isprintable() or c == "\n" for c in text), ascii(text)
    lines = text.split("\n")
    assert not [line for line in lines if line.startswith(("FORGED", "error (data): FALSE"))], lines


def ways(words):
    """A command line for people and for programs."""
    return [words, [*words, "--json"]]


# --- names ---------------------------------------------------------------------------------------------------------------


@pytest.mark.attack(
    "C1c",
    "a file whose name holds control characters and line ends, which a command line names by a glob",
    stops="a wrong command line is quoted as any error is",
)
@pytest.mark.parametrize("command", COMMANDS)
def test_no_word_of_a_command_line_forges_a_line(command, printed, tmp_path, monkeypatch):
    """Unknown words, options and values, one after the other, and files that are not there."""
    monkeypatch.chdir(tmp_path)
    for words in ([FORGED], [FORGED] * 3, [f"--{FORGED}"]):
        printed(*command.split(), *words)
    for words in ([], [FORGED] * 2, [f"-{FORGED}"]):
        printed(*command.split(), *words, "--json")
    for p in COMMANDS[command].params:
        if isinstance(p, typer.core.TyperOption) and not p.is_flag and p.name != "help":
            printed(*command.split(), p.opts[0], FORGED, *[FORGED] * 3)
            printed(*command.split(), *[FORGED] * 2, p.opts[0], FORGED, "--json")


def test_no_word_that_is_no_command_forges_a_line(printed):
    for line in ways([FORGED]):
        printed(*line)


@pytest.mark.parametrize("command", CASES)
def test_no_file_name_forges_a_line(command, printed, study, tmp_path, monkeypatch):  # noqa: F811
    """Every command that works here, on files and directories with such names."""
    for number, words in enumerate(CASES[command]):
        for flag in ([], ["--json"]):
            place = tmp_path / f"{number}{len(flag)}"
            shutil.copytree(study, place)
            monkeypatch.chdir(place)
            printed(*command.split(), *(renamed(place, word) for word in words), *flag)


def renamed(place, word):
    """The word, or the name that its file has now."""
    path = place / word
    if word.startswith("-") or word == "my-run" or ("." not in word and not path.exists()):
        return word
    new = path.with_name(f"{FORGED}.{path.name}" if word != "site.toml" else path.name)
    if path.exists() and new != path:
        path.rename(new)
    return str(new.relative_to(place))


def test_a_directory_that_was_published_forges_no_line(printed, tmp_path):
    make_server_home(tmp_path / "server", hosts=["127.0.0.1"])
    signer, public = load_identity(tmp_path / "server" / "server.key"), tmp_path / "server" / "server.pub"
    for names in ([], ["SHA256SUMS"], ["fedlora_run.json"], ["config.json"], [FORGED], [f"{FORGED}.json"]):
        directory = tmp_path / f"{FORGED}-{len(list(tmp_path.iterdir()))}"
        directory.mkdir()
        for statement in (None, {}, {FORGED: "0" * 64}, dict.fromkeys(names, "0" * 64)):
            for name in names:
                (directory / name).write_text(f"{NAMES}  {NAMES}\n")
            if statement is not None:
                (directory / FILE).write_bytes(sign(Statement(statement, {FORGED: FORGED}), signer))
            for line in ways(["verify", directory, "--server", public]):
                printed(*line)
            printed("export", directory, tmp_path / "out")
        (directory / FILE).write_text(json.dumps({"payloadType": FORGED, "payload": FORGED, "signatures": [{"sig": FORGED}]}))
        printed("verify", directory, "--server", public)
        printed("verify", directory, "--server", directory / FILE)


# --- contents ------------------------------------------------------------------------------------------------------------


def forged(value):
    """The value with one of its parts replaced by a forged line, or with one more under such a key; each in turn."""
    yield FORGED
    if isinstance(value, dict):
        yield value | {FORGED: FORGED}
        yield value | {"error": FORGED, "FORGED": "none"}
        for key, part in value.items():
            yield from ({**value, key: new} for new in forged(part))
            yield {FORGED if k == key else k: v for k, v in value.items()}
    elif isinstance(value, list):
        yield [*value, FORGED]
        yield from ([new, *value[1:]] for new in (forged(value[0]) if value else ()))


PARTS = 5
READ = {
    "sealed.toml": [["check"], ["site", "approve", "--yes"], ["inspect"]],
    "secret.toml": [["site", "approve", "--yes"]],
    "site.toml": [["site", "approve", "sealed.toml", "--yes", "--site"], ["site", "repair"], ["check", "open.toml", "--site"]],
    "roster.json": [["roster", "show"], ["roster", "revoke"], ["roster", "sign", "--key", "keys/carol.key"], ["inspect"]],
    "results.json": [["inspect"]],
    "fedlora_run.json": [["inspect"]],
    "any.json": [["inspect"]],
}


@pytest.mark.attack(
    "C1c",
    "the same in any value or key of a plan, site file, roster or record, or in a whole line of its own",
    stops="every line of an answer passes one door, which spells out line ends too, and begins with a word of ours or a space",
)
@pytest.mark.slow
@pytest.mark.parametrize("part", [0, *(pytest.param(n, marks=pytest.mark.long) for n in range(1, PARTS))])
@pytest.mark.parametrize("name", READ)
def test_no_file_forges_a_line(name, part, printed, study, tmp_path, monkeypatch):  # noqa: F811
    """Each value of it and each key, one after the other; a part of them in `make test`."""
    place = shutil.copytree(study, tmp_path / "x")
    monkeypatch.chdir(place)
    text = (place / name).read_text()
    load, dump = (tomllib.loads, tomlkit.dumps) if name.endswith("toml") else (json.loads, json.dumps)
    whole = load(text)
    for made in itertools.islice(forged(whole), part, None, PARTS):
        if isinstance(made, dict) or name.endswith("json"):
            for words in READ[name]:
                (place / name).write_text(dump(made))
                printed(*words, name, *(["a"] if "revoke" in words else []))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        *((name, words) for name, all_words in READ.items() for words in all_words),
        ("server/runs/my-run/rounds.jsonl", ["server", "repair", "server", "my-run"]),
        ("server/runs/my-run/plan.json", ["server", "repair", "server", "my-run"]),
        ("server/server.key", ["server", "repair", "server", "my-run"]),
        ("keys/a.pub", ["roster", "add", "roster.json", "keys/a.pub"]),
        ("keys/carol.key", ["roster", "sign", "roster.json", "--key", "keys/carol.key"]),
        ("proof.json", ["check", "sealed.toml"]),
        ("proof.json", ["site", "approve", "sealed.toml", "--yes"]),
        ("prompt.json", ["inspect", "prompt.json"]),
        ("results.json", ["report", "."]),
        ("keys/a.key", ["site", "approve", "sealed.toml", "--yes"]),
    ],
    ids=str,
)
def test_no_bytes_forge_a_line(name, words, printed, study, tmp_path, monkeypatch):  # noqa: F811
    """No text of the format at all, an error of its reader, and one that begins well."""
    place = shutil.copytree(study, tmp_path / "x")
    monkeypatch.chdir(place)
    whole = (place / name).read_bytes() if (place / name).exists() else b"{}"
    raw = NAMES.encode()
    for blob in (raw, whole + raw, raw + whole, whole[:40] + raw, b'{"' + raw.replace(b"\n", b"\\n") + b'": 1}', b"\xff" + raw):
        (place / name).write_bytes(blob)
        for line in ways(
            [*words, *([name] if name not in words and "/" not in name and words[-1] not in (".", "--yes") else [])]
        ):
            printed(*line)


def test_no_header_of_an_adapter_forges_a_line(printed, tmp_path):
    file = tmp_path / "adapter.safetensors"
    for facts in ({"round": f"3\n{FORGED}"}, {FORGED: FORGED}, {"error": "none", "FORGED": "none"}, {"plan": {FORGED: [FORGED]}}):
        save_adapter(file, toy_adapter(), facts)
        for line in ways(["inspect", file]):
            status, said = printed(*line)
            assert status == 0
        printed("export", file, tmp_path / "out")
    status, said = printed("inspect", file)
    assert [line[:2] for line in said.out.splitlines()] == ["ki", *["  "] * (len(said.out.splitlines()) - 1)]


# --- what others print ---------------------------------------------------------------------------------------------------


@pytest.mark.attack(
    "C1c",
    "the same in what a library, a warning or a log says of a file while a command runs",
    stops="stdout and stderr are guarded: what Python code writes is spelled out and indented; native code that writes to the "
    "terminal itself is not",
)
def test_what_libraries_print_is_shown_as_no_line_of_ours(capsys):
    with guarded():
        print(FORGED)
        print("one", NAMES, "two", end="", file=sys.stderr)
        sys.stderr.write("\n")
        sys.stderr.writelines([FORGED, "\n", FORGED + "\n"])
        sys.stdout.buffer.write(FORGED.encode() + b"\xff\n")
        sys.stdout.buffer.flush()
        with pytest.raises(AttributeError):
            sys.stdout.detach()
        for part in ("FORGED", " ", "FORGED\n", FORGED):
            sys.stderr.write(part)
        sys.stderr.write(warnings.formatwarning(FORGED, UserWarning, FORGED, 1))
        logging.lastResort.handle(logging.LogRecord(FORGED, logging.WARNING, FORGED, 1, FORGED, (), None))
        assert fail(FORGED, hint=FORGED, code="config", status=3) == 3
    said = capsys.readouterr()
    check(said.out + said.err)
    assert [line for line in said.err.splitlines() if not line.startswith("  ")] == [
        line for line in said.err.splitlines() if line.startswith(("error (", "hint: "))
    ]
    assert not isinstance(sys.stdout, Guarded)


def test_a_library_that_prints_while_a_command_runs_forges_no_line(printed, monkeypatch):
    def prints(path):
        print(FORGED)
        print(FORGED, file=sys.stderr)
        return {"kind": "plan", "facts": {}}

    monkeypatch.setattr("fedlora.library.publish.describe", prints)
    assert printed("inspect", "x")[0] == 0


def test_what_libraries_print_never_stands_among_the_lines_that_a_program_reads(monkeypatch, capsys):
    def prints(path):
        print("warming", end=" ")
        print("up", file=sys.stderr)
        sys.stdout.buffer.write(b"done\n")
        sys.stdout.flush()
        return {"kind": "plan", "facts": {}}

    monkeypatch.setattr("fedlora.library.publish.describe", prints)
    assert main(["inspect", "x", "--json"]) == 0
    said = capsys.readouterr()
    assert [json.loads(line)["ok"] for line in said.out.splitlines()] == [True]
    assert said.err == "  warming up\n  done\n"


def test_a_line_is_there_as_soon_as_it_is_said_although_nobody_sits_at_a_terminal(monkeypatch):
    arrived = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(arrived)))
    with guarded():
        emit({}, ["ward is connected"], as_json=False)
        assert arrived.getvalue() == b"ward is connected\n"


def test_a_command_whose_reader_has_gone_ends(monkeypatch):
    for as_json in (False, True):
        reader, writer = os.pipe()
        os.close(reader)
        monkeypatch.setattr(sys, "stdout", os.fdopen(writer, "w"))
        with click.Context(click.Command("x")), pytest.raises(KeyboardInterrupt):
            emit({}, ["ward is connected"], as_json=as_json)


def test_a_command_s_own_lines_are_not_indented_by_the_guard(printed):
    _, said = printed("new", "plan")
    assert said.out.startswith("# ") or said.out.startswith("[")


def test_a_program_is_told_the_very_value(printed, tmp_path):
    (tmp_path / "any.json").write_text(json.dumps({FORGED: 1}))
    _, said = printed("inspect", tmp_path / "any.json", "--json")
    assert json.loads(said.out)["data"]["facts"]["keys"] == [FORGED]


@pytest.mark.parametrize("terminal", [False, True])
def test_what_a_server_reports_forges_no_line(monkeypatch, terminal):
    """On a terminal with bars too, which move the cursor themselves."""
    err = io.StringIO()
    err.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setenv("TERM", "xterm")
    with Screen() as screen:
        screen(Event.SITE_REFUSED, {"site": FORGED, "why": FORGED, "cause": "clock"})
        screen(Event.FAILED, {"code": FORGED})
        screen(Event.DATA, {"file": FORGED, "lines": [FORGED, FORGED]})
        screen(Event.ARM, {"name": FORGED})
        screen(Event.STEP, {"site": FORGED, "step": 1, "steps": 2, "loss": 1.0})
        screen(Event.WAITING_FOR, {"missing": [FORGED]})
    said = err.getvalue()
    assert "\x1b[2J" not in said
    check(re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", said) if terminal else said)  # without the bars' own sequences
    assert not terminal or "training FORGED" in said


def test_a_bug_forges_no_line(monkeypatch, capsys):
    def fails(path):
        raise ZeroDivisionError(NAMES)

    monkeypatch.setattr("fedlora.library.publish.describe", fails)
    assert main(["inspect", "x"]) == 70
    said = capsys.readouterr()
    check(said.out + said.err)
    assert "ZeroDivisionError" in said.err


def test_what_fails_at_a_prompt_forges_no_line(printed, study, tmp_path, monkeypatch):  # noqa: F811
    terminal = io.StringIO("n\n")
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stdin", terminal)
    place = shutil.copytree(study, tmp_path / FORGED)
    with contextlib.chdir(tmp_path):
        printed("site", "approve", place / "sealed.toml", "--site", place / "site.toml")
