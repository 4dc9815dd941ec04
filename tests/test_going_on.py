"""--resume names what differs from what has begun, and leaves no run of a sweep out of its table."""

import itertools
import json
import shutil
from dataclasses import replace

import pytest
from test_sweep import PLAN

from fedlora.cli import main
from fedlora.core.errors import StoreError
from fedlora.core.plan import Plan
from fedlora.core.toml import parse_toml
from fedlora.lab.claims import Options, claim, look

ASKED = parse_toml(PLAN, Plan, name="plan.toml")
OTHERWISE = {
    "transport": ({"transport": "flower"}, "--transport: local -> flower"),
    "drop": ({"drop": ("south@train", "north@train:2")}, "--drop: none -> north@train:2 south@train"),
    "batch_sites": ({"batch_sites": True}, "--batch-sites: False -> True"),
}


def leaves(table, at=()):
    for key, value in table.items():
        if isinstance(value, dict):
            yield from leaves(value, (*at, key))
        else:
            yield *at, key


KEYS = sorted(leaves(ASKED.model_dump(mode="json")))


@pytest.mark.parametrize("key", KEYS, ids=".".join)
def test_each_key_of_a_plan_that_differs_is_named_with_both_values_and_no_other(tmp_path, key):
    claim(tmp_path, ASKED, Options(tmp_path))
    facts = json.loads((tmp_path / "plan.json").read_text())
    table = facts["plan"]
    for name in key[:-1]:
        table = table[name]
    table[key[-1]] = "something else"
    (tmp_path / "plan.json").write_text(json.dumps(facts))
    with pytest.raises(StoreError) as refused:
        look(tmp_path, ASKED, Options(tmp_path, resume=True))
    assert f"the simulation of another plan: {'.'.join(key)}: something else -> " in str(refused.value)
    assert str(refused.value).count("->") == 1


@pytest.mark.parametrize("names", [c for n in (1, 2, 3) for c in itertools.combinations(OTHERWISE, n)], ids=" ".join)
@pytest.mark.parametrize("back", [False, True])
def test_each_option_that_differs_is_named_and_no_other(tmp_path, names, back):
    other = Options(tmp_path)
    for name in names:
        other = replace(other, **OTHERWISE[name][0])
    first, then = (other, Options(tmp_path)) if back else (Options(tmp_path), other)
    claim(tmp_path, ASKED, first)
    with pytest.raises(StoreError, match="a simulation that began otherwise") as refused:
        look(tmp_path, ASKED, replace(then, resume=True))
    for name, (_, said) in OTHERWISE.items():
        option, _, values = said.partition(": ")
        wanted = f"{option}: {' -> '.join(reversed(values.split(' -> ')))}" if back else said
        assert (wanted in str(refused.value)) == (name in names)


def test_of_many_keys_the_first_are_named_and_the_others_counted(tmp_path):
    claim(tmp_path, ASKED, Options(tmp_path))
    training = ASKED.training.model_copy(update={"learning_rate": 0.5, "max_length": 8, "weight_decay": 0.5, "warmup_ratio": 0.5})
    other = ASKED.model_copy(
        update={"training": training, "lora": ASKED.lora.model_copy(update={"r": 9, "lora_alpha": 5, "lora_dropout": 0.5})}
    )
    with pytest.raises(StoreError, match="and 2 more"):
        look(tmp_path, other, Options(tmp_path, resume=True))
    (tmp_path / "plan.json").write_text("no JSON")
    with pytest.raises(StoreError, match="damaged"):
        look(tmp_path, ASKED, Options(tmp_path, resume=True))


@pytest.mark.torch
def test_a_sweep_is_gone_on_with_by_more_values_and_never_without_those_of_before(tmp_path, capsys):
    (tmp_path / "plan.toml").write_text(PLAN.replace('"base", ', ""))
    out = tmp_path / "out"
    words = ["simulate", str(tmp_path / "plan.toml"), "--out", str(out), "-q", "--resume", "--set"]
    assert main([*words, "training.learning_rate=1e-3,1e-2"]) == 0
    kept = {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}
    capsys.readouterr()
    for other in ("training.learning_rate=1e-3,1e-1", "lora.r=2,4", "training.learning_rate=3e-3,1e-1"):
        for jobs in ("1", "2"):
            assert main([*words, other, "--jobs", jobs]) == 3
            said = capsys.readouterr().err
            assert "also holds " in said
            assert "learning_rate=1e-2" in said
            assert ("learning_rate=1e-3" in said) == ("=1e-3" not in other)
        assert {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()} == kept
    assert main([*words, "training.learning_rate=1e-3,1e-2,3e-2"]) == 0
    assert json.loads((out / "runs.json").read_text()) == [f"learning_rate={rate}" for rate in ("1e-3", "1e-2", "3e-2")]
    for seed in (out / "learning_rate=3e-2").glob("seed-*"):
        shutil.rmtree(seed)  # it never began: nothing of it is left out
    assert main([*words, "training.learning_rate=1e-3,1e-2"]) == 0
