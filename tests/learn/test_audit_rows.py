"""A site attacks an adapter with its own rows: what was trained on is told from what was not, and comes out word by word."""

from __future__ import annotations

import json

import numpy as np
import pytest
from jsonschema import Draft202012Validator
from learn.plans import plan_of

from fedlora.cli import main
from fedlora.cli.schema import schema_of
from fedlora.core.adapter import Adapter
from fedlora.core.toml import dump_toml
from fedlora.data import IGNORE, Conversation, Tokens, tokenize
from fedlora.data.turns import Turn
from fedlora.formats.files import save_adapter
from fedlora.learn.audit.extraction import extract, extract_both, greedy, halves, longest_run
from fedlora.learn.audit.scores import UNREADABLE, base_of, losses, scores
from fedlora.learn.evaluate import evaluate
from fedlora.learn.learner import HFLearner
from fedlora.rules.first import first_adapter
from fedlora.site.site_file import SiteFile

MODEL = "toy/base"
SECRETS = ["amber falcon 5831", "violet harbor 9917", "copper meadow 2280", "silver thunder 7046"]
OTHERS = ["cedar comet 4410", "scarlet anchor 6602", "golden lantern 1375", "frozen garden 8129"]


def plain(text):
    """A row whose first letter is given."""
    return Conversation((Turn("prompt", text[:1], False), Turn("completion", text[1:], True)), chat=False, line=1, group="")


@pytest.fixture
def learned(lora):
    """A model, the adapter that knows four rows by heart, those rows and four others of the same kind."""
    model = lora(seed=3, r=16, lora_alpha=64)
    members, others = (tokenize(list(map(plain, texts)), model.tokenizer, max_length=48)[0] for texts in (SECRETS, OTHERS))
    training = {"learning_rate": 1e-2, "per_device_train_batch_size": 4, "max_length": 48, "packing": False}
    plan = plan_of(local_steps=200, num_rounds=1, lr_scheduler_type="constant", **training)
    learner = HFLearner(model, members, others, plan, site="a")
    adapter = learner.train(first_adapter(model.layout, seed=0), round=1, state=b"").adapter
    return model, adapter, members, others, plan


def test_losses_of_single_rows_add_up_to_the_evaluation(lora, rows):
    from learn.conftest import moved

    model = lora()
    adapter = moved(model.get(), size=0.05)
    found = losses(model, adapter, rows, max_length=40, rows=5)
    tokens = np.array([e.supervised for e in rows])
    model.set(adapter)
    whole = evaluate(model, rows, max_length=40)
    assert (found * tokens).sum() / tokens.sum() == pytest.approx(whole.nll, abs=1e-4)
    assert scores(model, adapter, rows, score="loss", max_length=40) == pytest.approx(-found, abs=1e-5)
    base = losses(model, base_of(adapter), rows, max_length=40)
    assert scores(model, adapter, rows, score="ratio", max_length=40) == pytest.approx(base - found, abs=1e-4)
    first = losses(model, first_adapter(model.layout, seed=1), rows, max_length=40)
    assert base == pytest.approx(first, abs=1e-6)  # B is zero in the first adapter: it is the base


def test_short_rows_are_computed_as_many_at_once_as_have_the_tokens_of_a_long_one(lora, rows, monkeypatch):
    from fedlora.learn.forward import Forward

    model, seen, real = lora(), [], Forward.__call__
    monkeypatch.setattr(Forward, "__call__", lambda self, batch: seen.append(len(batch.sources)) or real(self, batch))
    longest = max(map(len, rows))
    one = losses(model, model.get(), rows, max_length=longest, rows=1)
    assert seen == [1] * len(rows)
    seen.clear()
    assert losses(model, model.get(), rows, max_length=4 * longest + 1, rows=1) == pytest.approx(one, abs=2e-3)
    assert max(seen) == 4


def test_a_row_whose_loss_is_no_number_is_the_least_likely_and_no_error(lora, rows):
    model = lora()
    adapter = Adapter(np.full(model.layout.size, 1e30, np.float32), model.layout)
    assert (losses(model, adapter, rows, max_length=40) == UNREADABLE).all()


def test_trained_rows_are_told_from_others_and_come_out_word_by_word(learned):
    model, adapter, members, others, _ = learned
    of_members = scores(model, adapter, members, score="ratio", max_length=48)
    of_others = scores(model, adapter, others, score="ratio", max_length=48)
    assert of_members.min() > of_others.max()
    with_adapter, with_base = extract_both(model, adapter, halves(members))
    assert (with_adapter.rows, with_adapter.found, with_base.found) == (4, 4, 0)
    assert with_adapter.longest >= 9 > with_base.longest
    assert extract(model, adapter, halves(others)).found == 0


def test_greedy_is_the_most_likely_token_each_time(learned):
    """Against the model's own logits, one whole pass a token."""
    import torch

    model, adapter, members, *_ = learned
    model.set(adapter)
    given, rest = halves(members)[0]
    said = greedy(model, given, tokens=6)
    ids = list(given)
    with torch.no_grad():
        for token in said:
            logits = model.peft_model(input_ids=torch.tensor([ids])).logits[0, -1]
            assert int(logits.argmax()) == token
            ids.append(token)
    assert said == rest[:6]


def test_rows_beyond_those_that_are_tried_are_not_copied():
    """A list of Python's integers takes nine times the memory of a row's tokens."""

    class Rows(list):
        def __iter__(self):
            for at, row in enumerate(super().__iter__()):
                assert at < 4, "a row too many"
                yield row

    lengths = (1, 9, 7, 8, 10)
    rows = Rows(Tokens(np.arange(n, dtype=np.int32), np.full(n, IGNORE, np.int32), line=1) for n in lengths)
    assert halves(rows, most=3) == [
        ([0, 1, 2, 3], [4, 5, 6, 7, 8]),
        ([0, 1, 2], [3, 4, 5, 6]),
        ([0, 1, 2, 3], [4, 5, 6, 7]),
    ]
    assert halves(rows[:1], most=None) == []


def test_the_longest_run_by_brute_force():
    random = np.random.default_rng(0)
    for _ in range(200):
        a, b = (random.integers(0, 3, random.integers(0, 12)).tolist() for _ in "ab")
        pairs = ((i, j) for i in range(len(a)) for j in range(i + 1, len(a) + 1))
        inside = [j - i for i, j in pairs if any(b[k : k + j - i] == a[i:j] for k in range(len(b)))]
        assert longest_run(a, b) == max(inside, default=0)


@pytest.fixture
def site(learned, toy, tmp_path):
    _, adapter, _, _, plan = learned
    plan = plan.model_copy(
        update={
            "model": plan.model.model_copy(update={"model_name_or_path": MODEL, "load_in_4bit": False}),
            "lora": plan.lora.model_copy(update={"r": 16, "lora_alpha": 64}),
        }
    )
    for name, texts in {"train": SECRETS, "held": OTHERS}.items():
        lines = [json.dumps({"prompt": text[:1], "completion": text[1:]}) for text in texts]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    data = {"path": "train.jsonl", "held_out_path": "held.jsonl"}
    file = SiteFile(name="a", models={MODEL: str(toy)}, data=data, device="cpu", threads=1)
    (tmp_path / "site.toml").write_text(dump_toml(file))
    run = "ab" * 32
    (tmp_path / "state" / "journal").mkdir(parents=True)
    save_adapter(tmp_path / "state" / "journal" / f"{run}.safetensors", adapter, {"run": run, "plan": plan.canonical().decode()})
    return tmp_path


def test_the_command_shows_it_here_and_quotes_no_row(site, capsys, caplog):
    assert main(["audit", "rows", str(site / "site.toml"), "--json", "--quiet"]) == 0
    out = capsys.readouterr().out
    answer = json.loads(out.splitlines()[-1])
    Draft202012Validator(schema_of("audit-rows")).validate(answer)
    data = answer["data"]
    assert (data["members"], data["others"], data["auc"], data["tpr_1"]) == (4, 4, 1.0, 1.0)
    assert (data["with_adapter"]["found"], data["with_base"]["found"]) == (4, 0)
    assert main(["audit", "rows", str(site / "site.toml"), "--quiet", "--run", "ab"]) == 0
    said = capsys.readouterr()
    assert "does not mean that nothing leaks" in said.out
    assert "4 held-out rows: neither rate is resolved" in said.out
    for word in {word for text in SECRETS + OTHERS for word in text.split()}:
        assert word not in said.out + said.err + out + caplog.text
    assert main(["audit", "rows", str(site / "site.toml"), "--run", "cd"]) == 3
    assert "abababababab" in capsys.readouterr().err


def test_without_held_out_rows_there_is_nothing_to_compare_with(site, capsys):
    from fedlora.site.site_file import load_site_file

    file = load_site_file(site / "site.toml")
    alone = file.model_copy(update={"data": file.data.model_copy(update={"held_out_path": "", "held_out_fraction": 0.0})})
    (site / "site.toml").write_text(dump_toml(alone))
    assert main(["audit", "rows", str(site / "site.toml"), "--quiet"]) == 3
    assert "nothing to compare with" in capsys.readouterr().err
