"""What is said of a run beside its published adapter is what was done."""

from __future__ import annotations

import json

import pytest
from raising import raising
from test_rounds import TARGETS, Federation, interrupted, plan

from fedlora.cli import main
from fedlora.core.errors import RunFailed
from fedlora.core.messages import Reply
from fedlora.core.plan import Model
from fedlora.data.prompt import unseen
from fedlora.formats.published.records import Prompt
from fedlora.formats.records import dump_text, facts_of
from fedlora.lab.testing import toy_adapter
from fedlora.rounds.server import start_run
from fedlora.rounds.store import RunStore

pytestmark = pytest.mark.torch


def facts(directory, out):
    assert main(["export", str(directory), str(out)]) == 0
    return json.loads((out / "fedlora_run.json").read_text())


def test_a_run_is_called_complete_when_all_its_rounds_are_done_and_not_before(tmp_path):
    fed = Federation(tmp_path, plan(rounds=3, min_sites=3))
    fed.answers["b"] = lambda request: Reply("b", error="resources")
    with raising(RunFailed, code="quorum"):
        fed.run()
    said = [facts(tmp_path / "run", tmp_path / "none")]
    fed.answers["b"] = fed.sites["b"].handle
    for rounds in (1, 1):
        interrupted(fed, after=rounds)
        said.append(facts(tmp_path / "run", tmp_path / f"out-{len(said)}"))
    fed.run()
    said.append(facts(tmp_path / "run", tmp_path / "whole"))
    assert [(s["rounds"], s["complete"]) for s in said] == [(0, False), (1, False), (2, False), (3, True)]


@pytest.mark.parametrize(
    ("model", "said"),
    [({}, "(nf4)"), ({"bnb_4bit_quant_type": "fp4"}, "(fp4)"), ({"load_in_4bit": False, "load_in_8bit": True}, "(int8)")],
)
def test_the_card_says_how_the_base_was_quantized(tmp_path, model, said):
    fed = Federation(tmp_path, plan(rounds=1, model=Model(**model)))
    fed.run()
    facts(tmp_path / "run", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"The base was held quantized {said}" in card


def test_what_is_published_names_the_run_the_plan_the_base_and_the_adapter(tmp_path):
    fed = Federation(tmp_path, plan(rounds=1))
    last = fed.run()
    said, store = facts(tmp_path / "run", tmp_path / "out"), RunStore.open(tmp_path / "run")
    assert said["run"] == store.run
    assert said["plan"] == fed.plan.digest()
    assert said["base"] == fed.plan.model.digest
    assert said["adapter"] == last.adapter.digest()
    assert (said["sites"], said["protection"], said["aggregate"], said["seed"]) == (len(TARGETS), "sealed", "fedavg", 0)
    assert not any(f'"{name}"' in json.dumps(said) for name in TARGETS)  # sites by number, never by name


def test_the_number_of_sites_is_not_said_where_a_record_is_gone(tmp_path):
    fed = Federation(tmp_path, plan(rounds=2))
    fed.run()
    file = tmp_path / "run" / "rounds.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    for number, blob in enumerate((lines[0], b"", lines[0][:-9] + b"\n" + lines[1])):
        file.write_bytes(blob)
        assert facts(tmp_path / "run", tmp_path / f"out-{number}")["sites"] is None
    file.write_bytes(b"".join(lines))
    assert facts(tmp_path / "run", tmp_path / "whole")["sites"] == len(TARGETS)


KNOWN = {"template": "4d" * 32, "stop": ("</s>",)}


@pytest.mark.parametrize(("prompt", "length"), [("any", 1024), ("chat", 512), ("plain", 64)])
def test_how_an_adapter_is_asked_goes_from_the_start_of_a_run_to_what_is_published(tmp_path, prompt, length):
    asked = plan(rounds=1, training={"prompt": prompt, "max_length": length})
    given = Prompt(kind=prompt, max_length=length, example=None, **KNOWN)
    start_run(tmp_path / "run", asked, toy_adapter(), prompt=given)
    assert facts(tmp_path / "run", tmp_path / "out")["prompt"] == facts_of(given)


@pytest.mark.parametrize("other", [{"prompt": "plain"}, {"max_length": 64}])
def test_what_was_found_out_for_another_plan_is_not_published(tmp_path, other):
    given = Prompt(kind="chat", max_length=512, example=None, **KNOWN)
    asked = plan(rounds=1, training={"prompt": "chat", "max_length": 512} | other)
    start_run(tmp_path / "run", asked, toy_adapter(), prompt=given)
    assert facts(tmp_path / "run", tmp_path / "out")["prompt"] == facts_of(unseen(asked))


def test_a_damaged_file_on_prompts_is_named_with_the_way_on(tmp_path, capsys):
    start_run(tmp_path / "run", plan(rounds=1), toy_adapter(), prompt=unseen(plan(rounds=1)))
    (tmp_path / "run" / "prompt.json").write_bytes(dump_text(unseen(plan(rounds=1)))[:-9])
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 3
    said = capsys.readouterr().err
    assert "prompt.json is damaged" in said
    assert "--base" in said
    (tmp_path / "run" / "prompt.json").unlink()
    assert facts(tmp_path / "run", tmp_path / "out")["prompt"]["stop"] is None
