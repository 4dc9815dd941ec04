"""A key that takes a list, given something else: the form that works is shown, for every such key of a plan."""

import json
import shlex

import pytest

from fedlora.core.errors import ConfigError
from fedlora.core.plan import Plan
from fedlora.core.told.lists import takes_list
from fedlora.core.told.wrong_keys import _keys, field_of
from fedlora.core.toml import parse_toml
from fedlora.lab.sweep import combinations

LISTS = {
    "lora.target_modules": ["q_proj", "v_proj"],
    "lora.layers_to_transform": [0, 1],
    "evaluation.share": ["eval/nll", "train/loss"],
    "audit.repeats": [1, 4],
    "simulation.sites": ["north", "south"],
    "simulation.arms": ["base", "local"],
    "simulation.data.path": ["a.csv", "b.csv"],
    "simulation.data.held_out_path": ["a.csv", "b.csv"],
}
TEXTS = {"simulation.data.path", "simulation.data.held_out_path"}  # a text is one file: several are several runs
NAMES = {"simulation.arms": ("federatd", "federated"), "evaluation.share": ("eval/nl", "eval/nll")}
PLAN = "simulation.sites = 2\n"


@pytest.fixture
def plan(tmp_path):
    (tmp_path / "plan.toml").write_text(PLAN)
    return tmp_path / "plan.toml"


def value(plan, key):
    found = plan
    for name in key.split("."):
        found = getattr(found, name)
    return list(found)


def test_all_keys_of_a_plan_that_take_a_list_are_tried_here():
    assert {key for key in _keys(Plan, "") if (field := field_of(Plan, key.split("."))) and takes_list(field)} == set(LISTS)


@pytest.mark.parametrize("key", sorted(LISTS.keys() - TEXTS))
@pytest.mark.parametrize("form", ["{},{}", "[{},{}]"])  # as it is first tried; as a shell leaves ["base","local"]
def test_the_hint_is_a_setting_that_works(plan, key, form):
    typed = form.format(*LISTS[key])
    if typed.startswith("[") and isinstance(LISTS[key][0], int):
        typed = typed.replace("[", "").replace("]", "")  # no marks to take
    with pytest.raises(ConfigError, match="its value is a list") as refused:
        combinations(plan, [f"{key}={typed}"])
    words = shlex.split(refused.value.hint)
    assert words[0] == "--set"
    (one,) = combinations(plan, words[1:])
    assert value(one.plan, key) == LISTS[key]


def test_texts_in_a_row_are_several_runs_where_one_text_can_stand(plan):
    assert len(combinations(plan, ["simulation.data.path=a.csv,b.csv"])) == 2


@pytest.mark.parametrize("key", sorted(LISTS))
@pytest.mark.parametrize("wrong", ["first", True, 1.5, {"a": 1}])
def test_a_file_is_told_that_a_list_is_expected_in_one_sentence_and_without_types(key, wrong):
    wrong = LISTS[key][0] if wrong == "first" else wrong
    if key in TEXTS and isinstance(wrong, str):
        return
    table, last = key.rsplit(".", 1)
    text = f"[{table}]\n{last} = " + ("{ a = 1 }" if isinstance(wrong, dict) else json.dumps(wrong))
    with pytest.raises(ConfigError) as refused:
        parse_toml(text, Plan, name="plan.toml")
    said = str(refused.value)
    assert said.startswith(f"plan.toml: {key}: "), said
    assert not [word for word in ("tuple", "constrained", "literal", "array", ";") if word in said.partition("; or ")[0]], said
    if "a list is expected" in said and key != "simulation.data.held_out_path":  # which a simulation does not take at all
        form = said.partition("as ")[2].partition(";")[0].partition(" = ")[2]
        assert value(parse_toml(f"[{table}]\n{last} = {form}", Plan, name="x"), key) == json.loads(form)


@pytest.mark.parametrize(("key", "wrong", "meant"), [(key, *words) for key, words in NAMES.items()])
def test_a_misspelled_name_in_a_list_is_named_with_what_is_near(plan, key, wrong, meant):
    for setting in (f'{key}=["{wrong}"]', f'{key}=["{LISTS[key][0]}","{wrong}"]'):
        with pytest.raises(ConfigError) as refused:
            combinations(plan, [setting])
        assert str(refused.value).endswith(f"{key}: '{wrong}' cannot stand there; did you mean '{meant}'?")
    with pytest.raises(ConfigError, match=r"'zzzz' cannot stand there; known: .*" + meant):
        combinations(plan, [f'{key}=["zzzz"]'])


def test_an_empty_list_and_one_of_lists_are_still_refused(plan):
    for setting in ("simulation.arms=[]", 'simulation.arms=[["base"]]'):
        with pytest.raises(ConfigError, match=r"simulation\.arms"):
            combinations(plan, [setting])
