"""A rule of somebody's own that is broken is named with its file, its method and what is expected, before a base is loaded."""

import ast
import itertools
import textwrap
from pathlib import Path

import numpy as np
import pytest

from fedlora.core.adapter import Adapter, Layout
from fedlora.core.errors import ConfigError, RunFailed
from fedlora.core.registry import RULES
from fedlora.lab.own_rules import use_rules
from fedlora.lab.testing import toy_adapter, toy_plan
from fedlora.rules import BUILT_IN, Each, FedAvg, Rule, rule_of
from fedlora.rules.own import check_rule, finished, replied, started
from fedlora.rules.protocol import Aggregated

FINISH = "def finish(self, sums, adapter, *, scale, round, state):\n        return fedlora.Aggregated({})"
SIGNATURES = {
    "finish": "self, sums, adapter, *, scale, round, state",
    "trains": "self, round",
    "down": "self",
    "reply": "self, layout, round",
    "encode": "self, before, after, *, round",
    "check_published": "self, first, now, *, moved, rounds, grid",
    "start": "self, adapter, *, cohort, round",
    "of": "cls, plan, max_weight",
    "conflicts": "cls, plan",
}


def script(*, base="(fedlora.Rule)", needs='needs = "each"', finish=FINISH, more="pass", above=""):
    head = f'import fedlora\n{above}\n@fedlora.RULES.register("own")\nclass Own{base}:\n'
    return f"{head}    {needs or 'pass'}\n    {finish}\n    {more}\n"


def arguments(text):
    """The names of a signature, with the kinds in which it can be written wrongly: one missing, one more, or by place."""
    found = ast.parse(f"def f({text}): pass").body[0].args
    return [a.arg for a in found.args], [a.arg for a in found.kwonlyargs]


def wrong_signatures():
    """Each method with each of its arguments left out, with one too many, and without self."""
    for method, text in SIGNATURES.items():
        positional, keywords = arguments(text)
        deco = "@classmethod\n    " if method in ("of", "conflicts") else ""
        variants = [", ".join(filter(None, [*positional, "more", "*, " + ", ".join(keywords) if keywords else ""]))]
        variants += [", ".join([*positional[:at], *positional[at + 1 :], *(["*", *keywords] if keywords else [])])
                     for at in range(1, len(positional))]  # fmt: skip
        variants += [", ".join([*positional, *([] if len(keywords) == 1 else ["*"]), *keywords[:at], *keywords[at + 1 :]])
                     for at in range(len(keywords))]  # fmt: skip
        variants += [", ".join([*positional, *(["*", *keywords] if keywords else []), "*, more"])] if not keywords else []
        for variant in variants:
            yield method, f"{deco}def {method}({variant}):\n        pass"


BROKEN = {
    "no base": (script(base=""), "is no fedlora.Rule", "class Own(fedlora.Rule)"),
    "base object": (script(base="(object)"), "is no fedlora.Rule", "class Own(fedlora.Rule)"),
    "no base, no finish": (script(base="(object)", finish="pass"), "is no fedlora.Rule", "def finish(self, sums, adapter"),
    "no finish": (script(finish="pass"), "has no method finish", "def finish(self, sums, adapter, *, scale, round, state)"),
    "finish is a number": (script(finish="finish = 3"), "has finish = 3", "def finish("),
    "finish is async": (script(finish=f"async {FINISH}"), "with async or yield", "def finish("),
    "finish yields": (script(finish=FINISH.replace("return", "yield")), "async or yield", "def finish("),
    "a function": ("import fedlora\n@fedlora.RULES.register('own')\ndef own(sums): pass", "but a function", "class Name("),
    "an object": ("import fedlora\nfedlora.RULES.register('own', 3)", "no class but a int", "class Name("),
    "no needs": (script(needs=""), "does not say whether finish sees the sum", 'needs = "each"'),
    "of is no class method": (script(more="def of(self, plan, max_weight): pass"), "it is called of the class", "@classmethod"),
    "a field without default": (
        script(more="def __init__(self): pass"), "cannot be made of a plan as Class(max_weight)", "needs a default",
    ),
    "two needed fields": (script(more="def __init__(self, max_weight, beta): pass"), "cannot be made of a plan", "of"),
    "settings of another kind": (script(more="Settings = dict"), "Settings = a type", "fedlora.Section"),
    **{
        f"needs {needs}": (script(needs=f"needs = {needs}"), f"says needs = {said}", 'needs = "sum"')
        for needs, said in {"'every'": "'every'", "'Each'": "'Each'", "1": "1", "['each']": "a list", "''": "''",
                            "property(lambda self: 'each')": "a property"}.items()
    },
    **{
        f"{flag}": (script(more=f"{flag} = 'yes'"), f"says {flag} = 'yes'", f"{flag} = True")
        for flag in ("varies_rank", "keeps_moments", "keeps_local_factor", "refactorizes", "mixes_ranks")
    },
    **{
        f"{method} {number}": (
            script(finish="", more=body) if method == "finish" else script(more=body),
            f"has {method}(",
            f"def {method}({SIGNATURES[method]})",
        )
        for number, (method, body) in enumerate(wrong_signatures())
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def forgotten():
    yield
    RULES.forget("own")


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_rule_is_refused_as_it_is_registered(tmp_path, name):
    text, said, way_out = BROKEN[name]
    (tmp_path / "own.py").write_text(text)
    with pytest.raises(ConfigError) as error:
        use_rules([str(tmp_path / "own.py")])
    assert said in str(error.value)
    assert "'own'" in str(error.value)
    assert way_out in error.value.hint
    if (
        "a function" not in name
        and "an object" not in name
        and name not in ("no base, no finish", "no finish", "finish is a number")
    ):
        assert str(tmp_path / "own.py") in str(error.value)
        assert "class Own" in str(error.value)
    assert "own" not in RULES


WHOLE = {
    "plain": script(),
    "by place": script(finish=FINISH.replace("*, ", "")),
    "with keywords": script(finish=FINISH.replace("scale, round, state", "round, **more")),
    "with star": script(finish=FINISH.replace("sums, adapter, *, scale, round, state", "*all, **more")),
    "other names by place": script(finish=FINISH.replace("sums, adapter", "updates, before")),
    "defaults": script(finish=FINISH.replace("state)", "state=None, extra=1)")),
    "static": script(more="@staticmethod\n    def down(): return 'AB'"),
    "of a built-in rule": script(base="(FedAvg)", needs="", above="from fedlora.rules import FedAvg"),
    "needs of a mixin": script(base="(Sees, fedlora.Rule)", needs="", above="class Sees:\n    needs = 'each'\n"),
    "dataclass": script(above="from dataclasses import dataclass").replace("class Own", "@dataclass(frozen=True)\nclass Own"),
    "a property": script(more="keeps_local_factor = property(lambda self: False)"),
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_rule_is_taken_however_it_is_written(tmp_path, name):
    (tmp_path / f"whole_{list(WHOLE).index(name)}.py").write_text(WHOLE[name])
    use_rules([str(tmp_path / f"whole_{list(WHOLE).index(name)}.py")])
    assert isinstance(rule_of(toy_plan(aggregate={"name": "own"})), Rule)


def test_the_built_in_rules_pass_it():
    for name, rule in BUILT_IN.items():
        if rule.needs == "each" or name == "fedavg":
            check_rule(name, rule)


# --- what a method returns ------------------------------------------------------------------------------------------------

LAYOUT = toy_adapter().layout
A = Layout.of({"toy.lora_A.weight": (2, 3)})
OTHER = Layout.of({"toy.lora_A.weight": (3, 3), "toy.lora_B.weight": (4, 3)})
STRANGE = Layout.of({"x.lora_A.weight": (2, 3)})


def zeros(layout):
    return Adapter(np.zeros(layout.size, np.float32), layout)


class Whole(FedAvg):
    """Line and file of its methods stand in the errors."""

    def finish(self, sums, adapter, *, scale, round, state):
        raise NotImplementedError

    def start(self, adapter, *, cohort, round):
        raise NotImplementedError

    def reply(self, layout, round):
        raise NotImplementedError


RETURNED = {
    "nothing": None,
    "an array": np.zeros(20, np.float32),
    "an adapter": toy_adapter(),
    "a pair": (toy_adapter(), {}),
    "a dict": {"delta": toy_adapter()},
    "neither": Aggregated({}),
    "both": Aggregated({}, delta=toy_adapter(), adapter=toy_adapter()),
    "array as delta": Aggregated({}, delta=np.zeros(20, np.float32)),
    "array as adapter": Aggregated({}, adapter=np.zeros(20, np.float32)),
    "other shapes": Aggregated({}, delta=zeros(OTHER)),
    "other tensors": Aggregated({}, delta=zeros(STRANGE)),
    "an adapter of A alone": Aggregated({}, adapter=zeros(A)),
    "an adapter of another rank": Aggregated({}, adapter=zeros(OTHER)),
    "no record": Aggregated(None, delta=toy_adapter()),
    "a record of text": Aggregated({"agreed": "half"}, delta=toy_adapter()),
    "a record of NaN": Aggregated({"agreed": float("nan")}, delta=toy_adapter()),
    "a record of an array": Aggregated({"agreed": np.zeros(2)}, delta=toy_adapter()),
    "a record of numbers": Aggregated({1: 2.0}, delta=toy_adapter()),
    "arrays as state": Aggregated({}, delta=toy_adapter(), state={"m": np.zeros(20)}),
    "an adapter as state": Aggregated({}, delta=toy_adapter(), state=toy_adapter()),
}


def check_said(error):
    """It is named, with class, method, file and line, and a way out."""
    assert error.value.hint
    return f"{Path(__file__)}, line " in str(error.value)


@pytest.mark.parametrize("name", RETURNED)
def test_what_finish_returns_is_checked_where_it_is_called(name):
    with pytest.raises(RunFailed, match=r"the rule Whole: finish \(.*test_own.py, line \d+\) has returned") as error:
        finished(RETURNED[name], Whole(), toy_adapter())
    assert check_said(error)


@pytest.mark.parametrize(("method", "found"), itertools.product(["start", "reply"], [None, np.zeros(3), [], {}, "AB"]))
def test_what_start_and_reply_return_is_checked_where_they_are_called(method, found):
    with pytest.raises(RunFailed, match=rf"the rule Whole: {method} \(.*\) has returned ") as error:
        {"start": started, "reply": replied}[method](found, Whole())
    assert check_said(error)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("@classmethod\n    def of(cls, plan, max_weight): return None", "of .* has returned None rather than a Own"),
        ("@classmethod\n    def of(cls, plan, max_weight): return cls", "of .* has returned a type rather than a Own"),
        ("def down(self): return None", "down .* has returned None rather than 'AB', 'A' or 'B'"),
        ("def trains(self, round): return ['A']", "trains .* has returned a list rather than 'AB', 'A' or 'B'"),
    ],
)
def test_what_the_plan_gets_is_checked_before_a_base_is_loaded(tmp_path, more, said):
    file = tmp_path / f"gets_{abs(hash(more))}.py"
    file.write_text(script(more=more))
    use_rules([str(file)])
    with pytest.raises(RunFailed, match=said):
        rule_of(toy_plan(aggregate={"name": "own"}))


@pytest.mark.parametrize("number", [1, True, np.float32(0.5), np.int64(3), np.bool_(1), 0.5])
def test_any_number_is_one_of_a_record(number):
    record = finished(Aggregated({"agreed": number}, delta=toy_adapter()), Whole(), toy_adapter()).record
    assert record == {"agreed": float(number)}
    assert type(record["agreed"]) is float


def test_a_class_that_is_defined_again_takes_the_place_of_the_first(tmp_path):
    """A cell that is run again, or a module that is loaded again; but never another class."""
    cell = compile(textwrap.dedent(script()), "<cell 1>", "exec")
    again = compile(textwrap.dedent(script()), "<cell 2>", "exec")
    exec(cell, {"__name__": "__main__"})
    first = RULES["own"]
    exec(again, {"__name__": "__main__"})
    assert RULES["own"] is not first
    RULES.register("own", RULES["own"])
    for text in (script().replace("class Own", "class Other"), script()):  # another name; the same name in another place
        with pytest.raises(ConfigError, match="is already registered"):
            exec(compile(text, "other.py", "exec"), {"__name__": "other"})
    RULES.forget("own")
    for name, same in (("a.py", True), ("a.py", True), ("b.py", False)):
        code = compile(script(), str(tmp_path / name), "exec")
        if same:
            exec(code, {"__name__": "fedlora_rule_x"})
        else:
            with pytest.raises(ConfigError, match="is already registered"):
                exec(code, {"__name__": "fedlora_rule_x"})


def test_what_a_rule_that_sees_sums_alone_reads_of_single_updates_is_said_with_needs():
    from fedlora.lab.own_rules import own_errors
    from fedlora.rules import Sums

    namespace = {"__name__": "fedlora_rule_seen"}
    exec("def look(sums):\n    return sums.sites()", namespace)
    from fedlora.lab import own_rules

    own_rules._OWN.add("fedlora_rule_seen")
    with pytest.raises(RunFailed, match="has no attribute 'sites'") as error, own_errors():
        namespace["look"](Sums.start(LAYOUT, cohort=2, max_weight=1))
    assert 'needs = "each"' in error.value.hint
    assert Each(LAYOUT, 2, 1).sites() == []
