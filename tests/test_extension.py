"""What a rule, a protection and a reader of somebody's own take: registered from here, chosen in files, run in a federation.

Built in, each would touch these files of the tree and no others:

- the rule: a file in ``fedlora/rules/``, a line of ``BUILT_IN`` in ``fedlora/rules/__init__.py`` (which puts it under the laws),
  and the sample ``server/plan.toml``, which is generated;
- the protection: a file in ``fedlora/protect/``, a line of ``BUILT_IN`` in ``fedlora/protect/modes.py``, ``server/plan.toml``,
  FORMAT.md for its bytes, SECURITY.md for what it promises;
- the reader: a function and its line of ``BUILT_IN`` in ``fedlora/data/files/readers.py``, and the sample ``client/site.toml``.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import pytest
from pydantic import Field

from fedlora.core.adapter import MAX_PARAMETERS, Adapter
from fedlora.core.errors import ConfigError, FedLoRAError, RemoteError
from fedlora.core.messages import Request, Reveals
from fedlora.core.plan import Plan, parse_plan
from fedlora.core.registry import MODES, RULES, Registry
from fedlora.core.section import Section
from fedlora.core.tables.data import READERS
from fedlora.core.toml import dump_toml, sample
from fedlora.data.conversations import read
from fedlora.data.files.rows import NOT_FIELDS
from fedlora.formats import update as wire
from fedlora.formats.keys import Identity
from fedlora.formats.plans import load_plan
from fedlora.lab.testing import TOY_BASE, ToyLearner, toy_adapter
from fedlora.protect.mode import Mode, check_mode
from fedlora.protect.modes import mode_of
from fedlora.rounds.server import ServerRun, start_run
from fedlora.rounds.transport import LocalTransport, parse_dropouts
from fedlora.rules import Rule, Sums, rule_of
from fedlora.rules.protocol import Aggregated
from fedlora.site.approve import in_words
from fedlora.site.parts import site_of
from fedlora.site.site_file import load_site_file

# --- a rule -------------------------------------------------------------------------------------------------------


class PartSettings(Section):
    """For name = "part"."""

    way: Annotated[float, Field(gt=0, le=1)] = 0.5
    """share of the sites' mean move that is taken"""


@dataclass(frozen=True, slots=True)
class Part(Rule):
    """next = adapter + a part of the weighted mean."""

    way: float = 0.5
    needs: ClassVar[Reveals] = "sum"
    Settings: ClassVar[type[Section]] = PartSettings

    @classmethod
    def of(cls, plan, max_weight):
        return cls(max_weight, way=plan.aggregate.own(PartSettings).way)

    @classmethod
    def conflicts(cls, plan):
        yield from super(Part, cls).conflicts(plan)
        if plan.aggregate.own(PartSettings).way == 1:
            yield "aggregate.part.way = 1 is the mean itself: choose aggregate.name = 'fedavg'"

    def finish(self, sums: Sums, adapter, *, scale, round, state):
        return Aggregated({}, delta=Adapter(sums.mean() * np.float32(self.way), sums.layout))


# --- a protection -------------------------------------------------------------------------------------------------


class VeilSettings(Section):
    """For mode = "veil"."""

    key: Annotated[int, Field(ge=0, le=255)] = 0
    """byte that is added to each byte of an update"""


def veiled(blob: bytes, key: int) -> bytes:
    return bytes(b ^ key for b in blob)


class Veil(Mode):
    """Hides nothing from anybody who reads the plan: a toy."""

    Settings: ClassVar[type[Section]] = VeilSettings
    phases = work = frozenset({"veil-train", "veil-evaluate"})

    @classmethod
    def server(cls, parts):
        return VeilServer(parts.plan.protect.own(VeilSettings).key)

    @classmethod
    def site(cls, parts):
        return VeilSite()

    @classmethod
    def words(cls, plan, said):
        return {"who reads this site's update": "everybody who has the plan"}

    @classmethod
    def conflicts(cls, plan):
        if not plan.protect.own(VeilSettings).key:
            yield "protect.veil.key = 0 hides nothing: choose another one"


@dataclass(frozen=True)
class VeilServer:
    key: int
    reveals = "each"

    def missing(self, task, sites):
        return []

    def collect(self, task, sites, tally):
        body, most = wire.dump_task(task, reply_key=b""), wire.max_update_bytes(task.reply_layout, dtype="float32")
        for reply in (yield [Request(site, f"veil-{task.kind}", body, most) for site in sites]):
            try:
                if reply.error:
                    raise RemoteError(reply.site, reply.error)
                tally.accept(reply.site, wire.parse_update(veiled(reply.body, self.key), task.reply_layout))
            except FedLoRAError as e:
                tally.reject(reply.site, e)


class VeilSite:
    def answer(self, request, work):
        task, _ = wire.parse_task(request.body, max_parameters=MAX_PARAMETERS)
        plan = parse_plan(task.plan)
        check_mode(plan, "veil")
        key = plan.protect.own(VeilSettings).key
        return veiled(wire.dump_update(work(task), task.reply_layout, dtype="float32"), key)


# --- a reader -----------------------------------------------------------------------------------------------------


def arrows(source):
    """Lines of ``prompt -> completion``."""
    for number, line in source.lines():
        prompt, arrow, completion = line.rstrip().partition(" -> ")
        yield number, {"prompt": prompt, "completion": completion} if arrow else NOT_FIELDS


# --- in a federation ----------------------------------------------------------------------------------------------


@pytest.fixture
def added():
    RULES.register("part", Part)
    MODES.register("veil", Veil)
    READERS.register("arrows", arrows)
    yield
    RULES.forget("part")
    MODES.forget("veil")
    READERS.forget("arrows")


PLAN = """
[federation]
num_rounds = 2
local_steps = 1
min_sites = 2

[aggregate]
name = "part"
weighting = "uniform"
[aggregate.part]
way = 0.25
"""
VEILED = PLAN + '[protect]\nmode = "veil"\n[protect.veil]\nkey = 77\n'
SITE = 'name = "{name}"\n[data]\npath = "{name}.txt"\nformat = "arrows"\n[policy]\nprotect = ["{mode}"]\n'
LINES = {"a": "one -> 1\ntwo -> 2\n", "b": "one -> 1\ntwo -> 2\nthree -> 3\nno arrow\nfour -> 4\n"}
"""Of the usable rows there are 2 and 4: what the toy learners move towards."""


def pinned(tmp_path, text):
    (tmp_path / "plan.toml").write_text(text)
    return load_plan(tmp_path / "plan.toml").pinned(base=TOY_BASE, init=toy_adapter().digest())


def rows_of(path, file):
    found, _ = read(path.parent / file.data.path, format=file.data.format)
    return found


def federated(tmp_path, plan):
    """The last global adapter of a run of two sites, whose data the toy reader reads."""
    server, sites = Identity.generate("server"), {}
    identities = {name: Identity.generate(name) for name in LINES}
    for name, lines in LINES.items():
        path = tmp_path / f"{name}.toml"
        (tmp_path / f"{name}.txt").write_text(lines)
        path.write_text(SITE.format(name=name, mode=plan.protect.mode))
        file = load_site_file(path)
        file = file.model_copy(update={"plans": (plan.digest(),)})
        learner = ToyLearner(float(len(rows_of(path, file))))
        sites[name] = site_of(
            identities[name], server.public, file, make_learner=lambda _, found=learner: found, state=tmp_path / name,
            report=lambda event, facts: None,
        )  # fmt: skip
    store = start_run(tmp_path / "run", plan, toy_adapter())
    publics = {n: i.public for n, i in identities.items()}
    serving = ServerRun(store, server, publics, tmp_path / "none", lambda event, facts: None)
    at = serving.run(LocalTransport({n: s.handle for n, s in sites.items()}))
    assert all(record.sites.keys() == LINES.keys() for record in store.records())
    return at.adapter


@pytest.mark.parametrize("text", [PLAN, VEILED], ids=["sealed", "veiled"])
def test_a_rule_a_protection_and_a_reader_of_ones_own_run_a_federation(added, tmp_path, text):
    plan = pinned(tmp_path, text)
    value = 0.0
    for _ in range(2):  # each site moves half the way to its target
        value += 0.25 * np.mean([(len_ - value) / 2 for len_ in (2, 4)])
    tolerance = 1e-6 if plan.protect.mode == "veil" else 1e-2  # bfloat16 on the wire
    np.testing.assert_allclose(federated(tmp_path, plan).vector, value, rtol=tolerance)
    assert isinstance(rule_of(plan), Part)
    assert rule_of(plan).way == 0.25


def test_what_is_added_survives_its_file_and_the_wire_and_stands_in_the_sample(added, tmp_path):
    plan = pinned(tmp_path, VEILED)
    assert parse_plan(plan.canonical()) == plan
    assert pinned(tmp_path, dump_toml(plan)) == plan
    assert plan.digest() != pinned(tmp_path, VEILED.replace("0.25", "0.75")).digest()
    for line in ("#[aggregate.part]", "#way = 0.5", "#[protect.veil]", "#key = 0"):
        assert line in sample(Plan)
    assert in_words(plan)["who reads this site's update"] == "everybody who has the plan"


def test_an_added_mode_is_asked_by_everything_that_depends_on_the_mode(added, tmp_path):
    plan = pinned(tmp_path, VEILED)
    assert mode_of(plan) is Veil
    assert parse_dropouts(["a@train"], sites=LINES, plan=plan)
    with pytest.raises(ConfigError, match="not a dropout") as error:
        parse_dropouts(["a@mask"], sites=LINES, plan=plan)
    assert "steps under protect.mode = 'veil': train;" in error.value.hint
    refused = load_policy(tmp_path, "sealed").refusals(plan, models=frozenset({plan.model.model_name_or_path}))
    assert refused == {"policy-protect": "protection 'veil' is not among ['sealed']"}


def load_policy(tmp_path, mode):
    (tmp_path / "p.toml").write_text(SITE.format(name="a", mode=mode))
    return load_site_file(tmp_path / "p.toml").agreed


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("way = 0.25", "way = 1.0", "the mean itself: choose aggregate.name = 'fedavg'"),
        ("way = 0.25", "wya = 0.25", "aggregate.part.wya: unknown key; did you mean 'way'?"),
        ("way = 0.25", "way = 2.0", "aggregate.part.way: input should be less than or equal to 1"),
        ("key = 77", "key = 0", "protect.veil.key = 0 hides nothing"),
        ('name = "part"', 'name = "prat"', "no rule is called 'prat'; did you mean 'part'?"),
        ('mode = "veil"', 'mode = "sealed"', "protect.veil: this table is of mode = 'veil', the plan says 'sealed'"),
    ],
)
def test_what_is_wrong_in_an_added_table_is_said_like_in_any_other(added, tmp_path, old, new, said):
    with pytest.raises(ConfigError) as error:
        pinned(tmp_path, VEILED.replace(old, new))
    assert said in str(error.value)


@pytest.mark.parametrize("text", [PLAN, VEILED])
def test_without_the_script_the_names_mean_nothing(tmp_path, text):
    with pytest.raises(ConfigError, match="no rule is called 'part'"):
        pinned(tmp_path, text)
    with pytest.raises(ConfigError, match="no protection is called 'veil'"):
        load_policy(tmp_path, "veil")
    with pytest.raises(ConfigError, match="no file format is called 'arrows'"):
        load_policy(tmp_path, "sealed")


@pytest.mark.parametrize("name", ["os:system", "fedlora.rules.FedAvg", "tests.test_extension.Part", "../x", "__class__", ""])
def test_a_name_never_becomes_code(name, tmp_path):
    with pytest.raises(ConfigError, match="no rule is called"):
        pinned(tmp_path, f'[aggregate]\nname = "{name}"')
    assert name not in RULES


def test_a_name_that_is_there_is_not_given_to_another(added):
    for name in ("fedavg", "part"):
        with pytest.raises(ConfigError, match="is already registered"):
            RULES.register(name, type("Other", (Part,), {}))
    RULES.forget("fedavg")
    assert "fedavg" in RULES


def test_a_decorator_registers_and_gives_back_what_it_was_given():
    registry: Registry[type] = Registry("thing", "fedlora.protect.modes")

    @registry.register("mine")
    class Mine:
        pass

    assert registry["mine"] is Mine
    assert registry.names()[-1] == "mine"


def test_a_mode_without_both_halves_is_refused_when_its_class_is_made():
    with pytest.raises(TypeError, match="Half lacks server, words"):
        type("Half", (Mode,), {"site": Veil.site})
