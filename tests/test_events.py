"""Events: who reports says one that is known, with exactly its facts, and none is lost on its way to the screen."""

import ast
import json
import re
from pathlib import Path

import pytest
from test_rounds import Federation, plan
from test_run_records import RECORD
from typing_extensions import is_typeddict

from fedlora.cli.output import Screen
from fedlora.core.events import FACTS, Event, dump_facts_of, facts_of, parse_event
from fedlora.core.facts import Other, Train
from fedlora.core.told.lines import LINES, QUIET
from fedlora.flower.jobs import Events, pass_on

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "fedlora").rglob("*.py"))
REPORTERS = ("report", "_report")


def imported(tree):
    """Name in the file -> name where it comes from."""
    return {
        alias.asname or alias.name: alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        and node.module in {f"fedlora.core.{m}" for m in ("events", "facts", "deployment.status", "sites.facts", "tables.lab")}
        for alias in node.names
    }


def strange_calls(source):
    """Calls of ``report`` that do not name a member of the enum and build its own facts, and how many are right.

    Whoever passes on what another one told may do so: ``report(event, facts)``.
    """
    tree, wrong, right = ast.parse(source), [], 0
    known, made, events = imported(tree), {}, {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            made[node.targets[0].id] = node.value
    for function in ast.walk(tree):  # a helper of the same file whose result is the facts
        if isinstance(function, ast.FunctionDef) and isinstance(function.returns, ast.Name):
            made[f"{function.name}()"] = function.returns.id
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in REPORTERS):
            continue
        if ast.unparse(node) in ("report(event, facts)", "report(event, {'site': site, **facts})") or (
            len(node.args) == 1 and isinstance(node.args[0], ast.Starred) and "parse_event(" in ast.unparse(node.args[0])
        ):
            continue
        if len(node.args) != 2:
            wrong.append(ast.unparse(node))
            continue
        first, facts = node.args
        if isinstance(first, ast.Name):
            first = made.get(first.id, first)
        both = [first.body, first.orelse] if isinstance(first, ast.IfExp) else [first]
        if isinstance(facts, ast.Name):
            facts = made.get(facts.id, facts)
        name = getattr(getattr(facts, "func", None), "id", "")
        name = known.get(name) or known.get(made.get(f"{name}()", ""), "")
        members = [ast.unparse(e).removeprefix("Event.") for e in both if ast.unparse(e).startswith("Event.")]
        fits = len(members) == len(both) and all(m in Event.__members__ and FACTS[Event[m]].__name__ == name for m in members)
        events |= dict.fromkeys(members)
        wrong += [] if fits else [ast.unparse(node)]
        right += fits
    return wrong, right, set(events)


def test_every_report_names_a_member_of_the_enum_and_builds_its_own_facts():
    """That the facts are exactly those of the type is the type checker's part: they are made by its constructor."""
    told, count = set(), 0
    for path in FILES:
        source = path.read_text()
        wrong, right, events = strange_calls(source) if "report(" in source else ([], 0, set())
        assert wrong == [], path
        told |= events
        count += right
    assert count > 40
    assert told == set(Event.__members__) - {"OTHER"}  # and no event is there that nobody tells


@pytest.mark.parametrize(
    "call",
    [
        'report("train", Train(round=1, rounds=2))',
        'report(Event.TRAIN, {"round": 1, "rounds": 2})',
        "report(Event.TRAIN, Evaluate(round=1))",
        "report(Event.TRAIN)",
        "self._report(Event.NONE, Train(round=1, rounds=2))",
        "report(Event.TRAIN if x else name, Train(round=1, rounds=2))",
        "facts = {}\nreport(Event.TRAIN, facts)",
    ],
)
def test_a_call_that_is_not_so_is_seen(call):
    head = "from fedlora.core.events import Evaluate, Event, Train\n"
    assert strange_calls(head + call)[0]
    assert strange_calls(head + "report(Event.TRAIN, Train(round=1, rounds=2))")[:2] == ([], 1)


@pytest.mark.parametrize("event", Event)
def test_every_event_says_what_it_means_and_is_printed_or_quiet_by_choice(event):
    assert is_typeddict(FACTS[event])
    assert FACTS[event].__doc__
    assert (event in LINES) != (event in QUIET)


def test_nothing_is_printed_for_an_event_that_is_none():
    assert set(LINES) | QUIET == set(Event)


def sample(event):
    """Facts that fit, made from the types."""
    made = {}
    for name, field in FACTS[event].__annotations__.items():
        text = getattr(field, "__forward_arg__", str(field))
        text = text.removeprefix("NotRequired[").rstrip("]") if text.startswith("NotRequired") else text
        made[name] = {
            "str": "words",
            "int": 3,
            "bool": True,
            "float": 1.5,
            "Kind": "train",
            "list[str]": ["a", "b"],
            "list[int]": [1, 2],
            "float | None": 0.5,
            "Mapping[str, float]": {"train/loss": 0.5},
            "Mapping[str, float": {"train/loss": 0.5},
            "Mapping[str, str]": {"a": "late"},
            "RoundRecord": RECORD,
            "RunState": "running",
            "Standing": "ready",
            "Any": {"cups": [2, None]},
        }[text]
    return made


@pytest.mark.parametrize("event", Event)
def test_what_is_written_for_another_process_is_what_it_reads(event, tmp_path):
    facts = sample(event)
    assert facts_of(event).validate_python(facts) == facts
    assert parse_event(event, json.dumps(dump_facts_of(event, facts))) == (event, facts)
    (tmp_path / "flower" / "jobs").mkdir(parents=True)
    heard = []
    Events(tmp_path, "0" * 32)(event, facts)
    pass_on(tmp_path, "0" * 32, lambda *told: heard.append(told), offset=0)
    assert heard == [(event, facts)]


@pytest.mark.parametrize("event", sorted(set(Event) - QUIET))
def test_a_printed_line_has_all_that_it_speaks_of(event, capsys):
    with Screen() as screen:
        screen(event, sample(event))
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "{" not in said
    if event not in ("update", "sum", "round", "final"):  # metrics that a plan need not share, and numbers of another rule
        assert not re.search(r"(?<![a-z])-|-(?![a-z])", said.split("s  ", 1)[1]), said  # a dash is a fact that is missing


def test_an_event_of_another_version_is_told_and_not_dropped(tmp_path, capsys):
    (tmp_path / "flower" / "jobs").mkdir(parents=True)
    (tmp_path / "flower" / "jobs" / f"{'0' * 32}.events.json").write_text('{"event": "tea", "facts": {"cups": 2}}\n')
    with Screen() as screen:
        pass_on(tmp_path, "0" * 32, screen, offset=0)
    assert "tea: reported by another version" in capsys.readouterr().err


@pytest.mark.parametrize("facts", [{}, {"round": 1}, {"round": 1, "rounds": 2, "more": 3}, {"round": "1", "rounds": 2}, []])
def test_facts_that_are_not_those_of_the_event_are_of_another_version(facts):
    assert parse_event("train", json.dumps(facts)) == (Event.OTHER, Other(name="train", facts=facts))
    assert parse_event("train", b'{"round": 1, "rounds": 2}') == (Event.TRAIN, Train(round=1, rounds=2))


def test_what_a_federation_reports_has_the_documented_facts(tmp_path):
    fed = Federation(tmp_path, plan(rounds=2))
    fed.run()
    assert {"start", "ask", "update", "round", "final"} <= {e for e, _ in fed.events}
    for event, facts in fed.events:
        facts_of(Event(event)).validate_python(dict(facts))
