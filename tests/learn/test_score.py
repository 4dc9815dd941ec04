"""`fedlora evaluate`: base and adapter side by side on rows at hand, by plain PEFT."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora.cli import main
from fedlora.core.errors import DataError
from fedlora.core.plan import Model, Plan
from fedlora.core.tables.data import SiteData
from fedlora.core.toml import dump_toml
from fedlora.data import IGNORE, Tokens
from fedlora.formats.published.records import Prompt, RunFacts
from fedlora.learn.bases.digest import base_digest
from fedlora.learn.evaluate import evaluate
from fedlora.learn.export import export_adapter
from fedlora.learn.published import sides
from fedlora.learn.published.ask import answers
from fedlora.learn.published.clusters import clusters
from fedlora.learn.published.loaded import load
from fedlora.learn.published.score import interval, mcnemar, score
from fedlora.learn.published.sides import forced
from fedlora.learn.rows import read_rows, to_tokens
from fedlora.site.site_file import SiteFile

pytestmark = pytest.mark.torch
ROWS = [{"prompt": f"{n} apples:", "completion": f" {'many ' * (n % 5)}{n}"} for n in range(1, 30)]
MODEL = Plan().model


def silent(event: object, facts: object) -> None:
    pass


@pytest.fixture
def published(lora: Any, toy: Path, moved: Any, tmp_path: Path):
    """A model as `fedlora evaluate` loads it, the directory of an adapter for it, and rows."""
    model = lora({"load_in_4bit": MODEL.load_in_4bit})
    run = RunFacts(
        of="federation", run="1" * 64, plan="2" * 64, base=base_digest(toy, Model()), adapter="4" * 64, aggregate="fedavg",
        protection="sealed", seed=0, rounds=3, complete=True, sites=2, share="AB", privacy=None, audit=None,
        prompt=Prompt(kind="plain", max_length=64, template=None, stop=("</s>",), example=None),
    )  # fmt: skip
    adapter = moved(model.get(), size=3.0)
    out = export_adapter(adapter, tmp_path / "adapter", lora=model.settings, base_model="org/tiny", revision="", run=run)
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return model, adapter, out, file


def test_both_sides_are_what_the_loop_of_the_rounds_says(published, toy, monkeypatch):
    """The oracle scores packed rows of a model of ours, whose adapter is set, not loaded by PEFT."""
    model, adapter, out, file = published
    found = score(out, toy, [file], data=SiteData(), report=silent)
    plan = Plan(training={"prompt": "plain", "max_length": 64})
    examples = to_tokens(model.tokenizer, read_rows(file, SiteData(), silent), SiteData(), plan=plan, report=silent)
    for side, values in ((found.adapter, adapter), (found.base, type(adapter)(0 * adapter.vector, adapter.layout))):
        model.set(values)
        ours = evaluate(model, examples, max_length=64)
        assert (ours.tokens, ours.examples) == (int(found.tokens.sum()), len(ROWS))
        assert found.nll(side) == pytest.approx(ours.nll, rel=2e-3)
        assert int(side.right.sum()) == ours.exact
    assert np.abs(found.adapter.nats - found.base.nats).max() > 0.3
    for most in (1, 10**6):
        monkeypatch.setattr(sides, "_AT_ONCE", most)
        again = score(out, toy, [file], data=SiteData(), report=silent)
        assert np.allclose(again.adapter.nats, found.adapter.nats, rtol=0.02)


def test_an_answer_is_right_if_greedy_decoding_gives_it(published, toy):
    _, _, out, _ = published
    loaded, examples = load(out, toy), []
    for n in range(100):
        ids, least = loaded.tokenizer("abcdefghijklmnopqrstuvwxyz"[n % 26] * (n % 7 + 1), return_tensors="pt")["input_ids"], 9.0
        prompt = ids.shape[1]
        for _ in range(2):
            with torch.inference_mode():
                best = loaded.model(input_ids=ids).logits[0, -1].float().topk(2)
            least = min(least, float(best.values[0] - best.values[1]))
            ids = torch.cat([ids, best.indices[None, :1]], dim=1)
        if least < 0.03:
            continue  # bfloat16 may round these two the other way in another batch
        assert answers(loaded, [ids[0, :prompt].tolist()], max_tokens=2) == [ids[0, prompt:].tolist()]
        for wrong in (0, 1):
            given = ids[0].to(torch.int32).numpy()
            given[-1] = (given[-1] + wrong) % 256
            labels = given.copy()
            labels[:prompt] = IGNORE
            examples.append(Tokens(given, labels, n))
    assert len(examples) >= 6
    assert forced(loaded, examples)[1].tolist() == [True, False] * (len(examples) // 2)
    with loaded.model.disable_adapter():
        assert forced(loaded, examples)[1].sum() < len(examples) // 2


def test_answers_that_are_written_together_are_those_written_alone(published, toy):
    """Shorter prompts are filled up on their left, and answers end where they end."""
    _, _, out, _ = published
    loaded = load(out, toy)
    prompts = [loaded.tokenizer("abcxyz"[n] * (3 * n + 1))["input_ids"] for n in range(6)]
    together = answers(loaded, prompts, max_tokens=4)
    alone = [answers(loaded, [p], max_tokens=4)[0] for p in prompts]
    same = sum(a == b for a, b in zip(together, alone, strict=True))
    assert same >= 4, (together, alone)  # two tokens of a random model are often as likely in bfloat16
    stop = together[0][0]
    asked = loaded.prompt.model_copy(update={"stop": (loaded.tokenizer.convert_ids_to_tokens(stop),)})
    ended = answers(replace(loaded, prompt=asked), prompts, max_tokens=4)
    assert ended[0] == [stop]
    assert max(map(len, ended)) > 1  # others go on beside it


def test_with_labels_nothing_else_may_be_said(published, toy, tmp_path, capsys):
    _, _, out, file = published
    rows = [{"prompt": f"{n} apples:", "completion": " many" if n > 9 else " few"} for n in range(1, 25)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = score(out, toy, [file], data=SiteData(), labels=["few", "many"], report=silent)
    for side in (found.base, found.adapter):
        said = side.labeled
        assert said.truth.tolist() == [0] * 9 + [1] * 15
        own = said.nats[np.arange(24), said.truth]
        assert np.allclose(own, side.nats, rtol=0.02)  # the label that is in the row is the row
        assert said.accuracy == (said.nats.argmin(1) == said.truth).mean()
    words = ["evaluate", str(out), "--base", str(toy), "--on", str(file)]
    assert main([*words, "--labels", "few, many", "--generate", "3", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])["data"]
    assert set(answer["adapter"]["f1"]) == {"few", "many"}
    assert answer["written"] == 3
    assert 0 <= answer["base"]["rouge_l"] <= 1
    assert main([*words, "--labels", "few,lots"]) == 3
    assert "none of the 2 labels in lines 10, 11, 12" in capsys.readouterr().err
    assert main([*words, "--labels", "few,few"]) == 3
    assert "2 to 64 different ones" in capsys.readouterr().err


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=12))
def test_mcnemar_is_the_share_of_all_ways_to_part_them_that_are_as_uneven(pairs):
    before, after = np.array([b for b, _ in pairs], bool), np.array([a for _, a in pairs], bool)
    gained, n = sum(a and not b for b, a in pairs), sum(a != b for b, a in pairs)
    ways = [sum(heads) for heads in product((0, 1), repeat=n)]
    uneven = sum(abs(2 * heads - n) >= abs(2 * gained - n) for heads in ways) / len(ways)
    assert mcnemar(before, after, np.arange(len(before))) == pytest.approx(uneven)


def test_the_interval_is_that_of_a_mean_and_weighs_tokens():
    random = np.random.default_rng(3)
    differences, tokens = random.normal(-0.3, 1.0, 400), np.ones(400, np.int64)
    low, high = interval(differences, tokens, np.arange(len(tokens)))
    error = 1.96 * differences.std() / math.sqrt(400)
    assert (low, high) == pytest.approx((differences.mean() - error, differences.mean() + error), abs=0.02)
    assert interval(differences, tokens, np.arange(len(tokens))) == (low, high)  # the same for the same rows
    differences, tokens = np.repeat([1.0, -1.0], 500), np.repeat([19, 1], 500)  # a mean of means would be near -0.47
    low, high = interval(differences, tokens, np.arange(len(tokens)))
    assert -0.02 < low < 0 < high < 0.02


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(1, 3)), min_size=1, max_size=12))
def test_one_patient_or_one_text_is_one_observation_and_what_shares_an_example_joins_them(rows):
    examples = [row_of(i, f"g{group}" if group else "", text) for i, (group, text, _) in enumerate(rows)]
    of = clusters(examples)

    def together(i, j):  # by definition: reachable over shared groups and equal texts
        seen, todo = {i}, [i]
        while todo:
            a = todo.pop()
            for b in range(len(rows)):
                same = rows[a][1] == rows[b][1] or (rows[a][0] and rows[a][0] == rows[b][0])
                if same and b not in seen:
                    seen.add(b)
                    todo.append(b)
        return j in seen

    assert all((of[i] == of[j]) == together(i, j) for i in range(len(rows)) for j in range(len(rows)))
    assert sorted(set(of)) == list(range(max(of) + 1))


def row_of(line, group, text):
    ids = np.array([1, 2, 3 + text], np.int32)
    return Tokens(ids, np.array([IGNORE, 2, 3 + text], np.int32), line, group)


@given(times=st.integers(1, 9), seed=st.integers(0, 99))
def test_rows_that_are_there_several_times_make_no_interval_narrower_and_no_p_smaller(times, seed):
    random = np.random.default_rng(seed)
    n = 12
    differences, tokens, of = random.normal(-0.3, 1, n), random.integers(1, 9, n), np.arange(n)
    before, after = random.random(n) < 0.4, random.random(n) < 0.6
    one = interval(differences, tokens, of), mcnemar(before, after, of)
    many = [np.tile(values, times) for values in (differences, tokens, of, before, after)]
    assert interval(*many[:3]) == pytest.approx(one[0])
    assert mcnemar(*many[3:], many[2]) == pytest.approx(one[1])


def test_the_command_says_both_sides_and_shows_rows_only_where_it_is_asked_to(published, toy, tmp_path, capsys):
    _, _, out, file = published
    rows = [{"prompt": "zz-question", "completion": "zz-answer"}, *ROWS]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["evaluate", str(out), "--base", str(toy), "--on", str(file)]
    assert main(words) == 0
    said = capsys.readouterr()
    assert "30 examples" in said.out
    assert "p = " in said.out
    assert "zz-" not in said.out + said.err
    assert main([*words, "--json", "--generate", "1"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["data"]["shown"] == []
    assert main([*words, "--show", "30", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])["data"]
    assert (answer["examples"], len(answer["shown"])) == (30, 30)
    assert answer["nll_low"] <= answer["nll_change"] <= answer["nll_high"]
    (one,) = (s for s in answer["shown"] if s["line"] == 1)
    assert (one["prompt"], one["expected"]) == ("zz-question", "zz-answer")
    assert main([*words, "--show", "1"]) == 0
    assert "expected:" in capsys.readouterr().out


def test_rows_are_read_as_the_site_file_says_and_what_cannot_be_scored_is_named(published, toy, tmp_path, capsys):
    _, _, out, file = published
    other = tmp_path / "rows.csv"
    other.write_text("frage;antwort\n3 apples:;three\n4 apples:;four\n", encoding="utf-8")
    words = ["evaluate", str(out), "--base", str(toy), "--on", str(other)]
    assert main(words) == 3
    assert "none of our column names" in capsys.readouterr().err
    data = SiteData(columns={"prompt": "frage", "completion": "antwort"})
    assert len(score(out, toy, [other], data=data, report=silent).tokens) == 2
    other.write_text("")
    assert main(words) == 3
    other.write_text("prompt;completion\nq;\n")
    with pytest.raises(DataError):
        score(out, toy, [other], data=SiteData(), report=silent)
    assert main(["evaluate", str(tmp_path / "none"), "--base", str(toy), "--on", str(file)]) == 3
    assert "holds no PEFT adapter" in capsys.readouterr().err
    assert main(["evaluate", str(out), "--base", str(tmp_path / "none"), "--on", str(file)]) == 3
    assert "no base model in" in capsys.readouterr().err


def test_rows_that_a_site_trains_on_are_no_test_of_its_adapter(published, toy, tmp_path, capsys):
    _, _, out, file = published
    site = tmp_path / "site.toml"
    site.write_text(dump_toml(SiteFile(name="alpha", data={"path": "rows.jsonl", "held_out_path": "held.jsonl"})))
    words = ["evaluate", str(out), "--base", str(toy), "--site", str(site)]
    for on in (str(file), str(tmp_path / "." / "rows.jsonl"), str(tmp_path / "ro*.jsonl"), str(tmp_path)):
        assert main([*words, "--on", on]) == 3
        assert "this site trains on most of its rows" in capsys.readouterr().err
    held = tmp_path / "held.jsonl"
    held.write_text(file.read_text())
    assert main([*words, "--on", str(held)]) == 0


def test_what_is_not_there_is_said_before_torch_is_loaded(tmp_path):
    """Seconds pass until it is."""
    for command in (["try", "--prompt", "x"], ["evaluate", "--on", "rows.jsonl"]):
        words = [sys.executable, "-X", "importtime", "-m", "fedlora", command[0], "none", "--base", "none", *command[1:]]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 3
        assert "holds no PEFT adapter" in done.stderr
        assert not re.search(r"\| +torch$", done.stderr, re.M)
