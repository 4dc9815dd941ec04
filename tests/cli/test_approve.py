"""`fedlora site approve`: what a person reads before a yes, and what a yes writes."""

import io
import json
import os
import sys
import time
import tomllib
import unicodedata

import click
import pytest
import typer
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedlora.cli import main
from fedlora.cli.output import fail
from fedlora.cli.terminal import wrapped
from fedlora.core.columns import columns
from fedlora.core.deployment.digests import grouped
from fedlora.core.errors import plain
from fedlora.core.plan import Plan, Protect
from fedlora.core.told.changes import changed_keys
from fedlora.core.toml import dump_toml
from fedlora.flower.enrol import make_roster, make_site_keys
from fedlora.formats.epochs import first_epoch
from fedlora.formats.keys import Identity, load_identity
from fedlora.formats.signed_roster import SignedRoster
from fedlora.formats.state.memory import FileMemory
from fedlora.lab.testing import toy_plan
from fedlora.protect.ledger import Base, Contribution, ContributionStore, Ledger
from fedlora.protect.secagg.settings import measure
from fedlora.site.admission import Begun, Runs
from fedlora.site.approve import Question, in_words, question, with_approval
from fedlora.site.policy import Policy
from fedlora.site.private import SitePrivacy
from fedlora.site.site_file import SiteFile, load_site_file

MODEL = Plan().model.model_name_or_path
SEALED = toy_plan(min_sites=3)
SECAGG = toy_plan(min_sites=3, name="secret", aggregate={"weighting": "uniform"}, protect=Protect(mode="secagg"))


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A site's directory with keys, its file and two plans, from which the command is called."""
    make_site_keys("guys", tmp_path / "keys")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sealed.toml").write_text(dump_toml(SEALED))
    (tmp_path / "secret.toml").write_text(dump_toml(SECAGG))
    write_site(tmp_path)
    return tmp_path


def write_site(home, models_too=(), **more):
    more = {"roster": "ab" * 32, "policy": Policy(protect=("sealed", "secagg"))} | more
    file = SiteFile(name="guys", key="keys/guys.key", models={MODEL: "x", **dict(models_too)}, **more)
    (home / "site.toml").write_text(dump_toml(file).replace("[data]", "# a comment of our own\n[data]"))


def plans(home):
    return load_site_file(home / "site.toml").plans


def test_a_yes_adds_the_digest_and_leaves_everything_else_as_it_was(home, capsys):
    before = (home / "site.toml").read_text()
    (home / "site.toml").chmod(0o640)
    assert main(["site", "approve", "sealed.toml", "--yes"]) == 0
    assert plans(home) == (SEALED.digest(),)
    after = (home / "site.toml").read_text()
    assert after.replace(f'plans = ["{SEALED.digest()}"]', "plans = []") == before
    assert (home / "site.toml").stat().st_mode & 0o777 == 0o640
    out = capsys.readouterr().out
    assert (
        f"plan {grouped(SEALED.digest())}, to be compared with the coordinator by telephone\n" in out
    )  # as `fedlora pin` has it
    assert "no proof.json of the coordinator lies beside sealed.toml" in out
    for words in ("3 rounds of 1 steps", "at least 3", "supervised tokens", "eval/exact_match", "the aggregator"):
        assert words in out
    assert (home / "state" / "approved" / f"{SEALED.digest()}.json").read_bytes() == SEALED.canonical()


def test_without_a_terminal_or_yes_nothing_is_approved(home, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    before = (home / "site.toml").read_text()
    assert main(["site", "approve", "sealed.toml"]) == 2
    assert main(["site", "approve", "sealed.toml", "--json"]) == 2
    assert (home / "site.toml").read_text() == before
    assert "--yes" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["approve sealed.toml", "leave site.toml"])
@pytest.mark.parametrize(("answer", "status"), [("y", 0), ("n", 5), ("", 130)], ids=["yes", "no", "ctrl-c"])
def test_on_a_terminal_a_person_is_asked(home, monkeypatch, capsys, command, answer, status):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stdin", terminal)

    def asked(text):
        if not answer:
            raise click.Abort
        return answer == "y"

    monkeypatch.setattr(typer, "confirm", asked)
    before = sorted(home.rglob("*")), (home / "site.toml").read_text()
    assert main(["site", *command.split()]) == status
    changed = (sorted(home.rglob("*")), (home / "site.toml").read_text()) != before
    assert changed is (answer == "y")
    said = capsys.readouterr().err
    assert said == ("" if answer == "y" else "error (declined): nothing was changed: nobody has said yes\n")


def test_who_reads_an_update_is_said_with_what_few_or_uneven_sites_show():
    def reads(**plan):
        return in_words(Plan(**plan))["who reads this site's update"]

    assert "with two sites in a round" in reads()
    assert "with two sites" not in reads(federation={"min_sites": 3})
    assert "one of them can compute another's" in reads(federation={"min_sites": 3})
    masked = {"federation": {"min_sites": 3}, "protect": {"mode": "secagg"}, "aggregate": {"weighting": "uniform"}}
    assert "NEARLY" not in reads(**masked).upper()
    weighed = reads(**masked | {"protect": {"mode": "secagg", "secagg": {"weight_unit": 50}}, "aggregate": {}})
    assert "WHERE THIS SITE WEIGHS MORE THAN THE OTHERS TOGETHER, the sum is nearly its update" in weighed
    assert "from what is published all sites do" in weighed


def test_a_roster_is_typed_as_it_is_read_aloud_and_a_wrong_or_a_missing_one_is_said_in_words(home, capsys):
    aloud = " ".join(["B4A5", "cda3", "e67e", "15a8"] * 4)
    write_site(home, roster=aloud)
    assert load_site_file(home / "site.toml").roster == "".join(aloud.split()).lower()
    assert main(["site", "approve", "secret.toml", "--yes"]) == 0
    for wrong, said in ((aloud[:-1], "here are 63 characters"), (f"{aloud[:-1]}o", "1 of them neither 0-9 nor a-f")):
        (home / "site.toml").write_text(f'name = "guys"\nroster = "{wrong}"\n')
        assert main(["site", "approve", "secret.toml", "--yes"]) == 3
        error = capsys.readouterr().err
        assert said in error
        assert "pattern" not in error
    write_site(home, roster="", policy=Policy())
    assert main(["site", "approve", "secret.toml", "--yes"]) == 5
    error = capsys.readouterr().err
    assert "`roster` in the site file is empty\nhint: nothing was approved: set `roster`" in error
    assert "[policy]" not in error


@pytest.mark.parametrize(
    ("site", "code", "hint"),
    [
        ({"models": {"other": "x"}}, "policy-allowed-models", "change [models] or policy.allowed_models in the site file"),
        ({"models": "sample"}, "policy-allowed-models", "[models] in the site file is still the sample's"),
        ({"policy": Policy(max_rounds=1, protect=("sealed",))}, "policy-max-rounds", "change policy.max_rounds in the site file"),
        ({"policy": Policy(min_sites=9, protect=("sealed",))}, "policy-min-sites", "change policy.min_sites in the site file"),
        ({"privacy": SitePrivacy(required=True, population="p")}, "plan-refused", "talk to the coordinator"),
    ],
)
def test_a_refused_approval_has_the_code_of_the_key_and_its_way_out(home, capsys, site, code, hint):
    """As a task of that plan would be refused, so that `fedlora explain` says the same."""
    models = {"models": SiteFile().models if site.get("models") == "sample" else site.get("models", {MODEL: "x"})}
    file = SiteFile(**{"name": "guys", "key": "keys/guys.key", **site, **models})
    (home / "site.toml").write_text(dump_toml(file))
    plan = SEALED.model_copy(update={"model": SEALED.model.model_copy(update={"model_name_or_path": "big/base"})})
    (home / "plan.toml").write_text(dump_toml(plan if "models" in site else SEALED))
    assert main(["site", "approve", "plan.toml", "--yes", "--json"]) == 5
    error = json.loads(capsys.readouterr().out.splitlines()[-1])["error"]
    assert error["code"] == code
    assert error["hint"].startswith("nothing was approved: ")
    assert hint in error["hint"]


@pytest.mark.parametrize("command", [["approve", "sealed.toml", "--yes", "--site"], ["pause"], ["leave", "--yes"]])
def test_whatever_makes_the_state_directory_makes_it_for_its_owner_alone(home, command):
    before = os.umask(0o022)
    try:
        assert main(["site", *command, "site.toml"]) == 0
    finally:
        os.umask(before)
    assert (home / "state").stat().st_mode & 0o777 == 0o700


def test_a_plan_that_is_approved_already_is_not_added_twice_unless_again(home, capsys):
    main(["site", "approve", "sealed.toml", "--yes"])
    assert main(["site", "approve", "sealed.toml", "--yes"]) == 0
    assert "approved already" in capsys.readouterr().out
    assert len(plans(home)) == 1
    Runs(FileMemory(home / "state" / "memory")).save([Begun("ab" * 32, SEALED.digest())])
    assert main(["site", "approve", "sealed.toml", "--yes", "--again"]) == 0
    out = capsys.readouterr().out
    assert "A FURTHER RUN OF ONE PLAN" in out
    assert "approved before: 1, begun: 1" in out
    assert plans(home) == (SEALED.digest(),) * 2


def test_a_plan_stands_beside_the_last_one_and_every_key_that_differs_is_named(home, capsys):
    main(["site", "approve", "sealed.toml", "--yes"])
    assert "no earlier plan" in capsys.readouterr().out
    other = SEALED.model_copy(update={"training": SEALED.training.model_copy(update={"max_grad_norm": 7.0, "max_length": 64})})
    (home / "other.toml").write_text(dump_toml(other))
    main(["site", "approve", "other.toml", "--yes"])
    out = capsys.readouterr().out
    assert "rows of 64 tokens" in out
    assert "was: 3 rounds of 1 steps, learning rate 0.0002, rows of 1024 tokens" in out
    assert "training.max_grad_norm: 1.0 -> 7.0" in out  # said although no sentence speaks of it
    assert out.count("was: ") == 1


def test_what_the_policy_refuses_is_said_and_not_approved(home, capsys):
    write_site(home, policy=Policy(max_rounds=1))
    assert main(["site", "approve", "sealed.toml", "--yes"]) == 5
    out = capsys.readouterr()
    assert "3 rounds are more than 1" in out.out
    assert "3 rounds are more than 1" in out.err
    assert plans(home) == ()


def test_a_plan_that_is_not_pinned_is_not_the_one_that_will_run(home, capsys):
    (home / "plan.toml").write_text(dump_toml(Plan()))
    assert main(["site", "approve", "plan.toml", "--yes"]) == 3
    assert "not pinned" in capsys.readouterr().err


def test_programs_get_one_object(home, capsys):
    assert main(["site", "approve", "sealed.toml", "--yes", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["data"]
    assert (found["plan"], found["approved"], found["refusals"]) == (SEALED.digest(), 1, [])
    assert found["asks"]["sites"] == "at least 3 in a round"


@pytest.mark.attack(
    "C1c",
    "a plan whose names hold control characters, to hide from the person who approves it what it asks for",
    stops="what a plan says is shown with such characters spelled out",
)
def test_a_plan_cannot_write_over_what_a_person_reads():
    model = SEALED.model.model_copy(update={"revision": "main\x1b[2K\r\nwho reads this site's update  nobody"})
    words = in_words(SEALED.model_copy(update={"model": model}))
    assert all(sentence.isprintable() for sentence in words.values())
    assert "\\x1b[2K\\r\\n" in words["base model"]


@pytest.mark.attack(
    "C1c",
    "a proof of hundreds of lines beside the plan, so that what a person decides on is out of sight",
    stops="twelve of them are shown, before the plan; the plan's words and what is agreed to stand directly above the question",
)
def test_a_long_proof_moves_nothing_out_of_sight(home, capsys):
    check = {"name": "ids", "verdict": "wrong", "found": "FOUND", "way_out": ""}
    proof = {"format": 1, "plan": SEALED.digest(), "base": SEALED.model.digest, "machine": "m", "checks": [check] * 300}
    (home / "proof.json").write_text(json.dumps(proof))
    assert main(["site", "approve", "sealed.toml", "--yes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum("FOUND" in line for line in lines) == 12
    assert lines[13] == "  and 288 more, in proof.json"
    assert lines[14].startswith(f"plan {grouped(SEALED.digest())}, to be compared")
    assert lines[14].startswith(f"plan {grouped(SEALED.digest())}, to be compared")


@pytest.mark.attack(
    "C1c",
    "the same with a name of a key, which is quoted in the error",
    stops="no text that the command prints holds such characters; a line that continues is indented",
)
@pytest.mark.parametrize("command", [["site", "approve"], ["check"]])
@pytest.mark.parametrize("as_json", [False, True])
def test_no_error_writes_over_what_a_person_reads(tmp_path, capsys, command, as_json):
    plan = tmp_path / "plan.toml"
    plan.write_text('"\\u001b[2J\\u001b[Hall is well\\nrun this: rm -rf\\u202e" = 1\n')
    assert main([*command, str(plan), *(["--json"] if as_json else [])]) == 3
    said = capsys.readouterr()
    assert all(c.isprintable() or c == "\n" for c in said.out + said.err)
    assert not any(line.startswith("run this") for line in said.err.splitlines())


def test_what_is_printed_moves_nothing_but_to_the_next_line(capsys):
    assert fail("one\x1b[2J\nrun this", hint="two\r\u202e\nand this", code="config", status=3) == 3
    assert capsys.readouterr().err.splitlines() == [
        "error (config): one\\x1b[2J",
        "  run this",
        "hint: two\\r\\u202e",
        "  and this",
    ]


# --- secure aggregation --------------------------------------------------------------------------------------------------


@pytest.fixture
def grown(home):
    """The site has given together with two others; a fourth is in their group on the roster since."""
    publics = [
        load_identity(home / "keys" / "guys.key").public,
        *(Identity.generate(n).public for n in ("marys", "north", "south")),
    ]
    coordinator, server = Identity.generate("coordinator"), Identity.generate("server")
    pinned = make_roster(home / "roster.json", server.public, publics, coordinator)
    memory = FileMemory(home / "state" / "memory")
    memory.put("roster", (home / "roster.json").read_bytes())
    contribution = Contribution.of(publics[:3], measure(SECAGG))
    ContributionStore(memory, load_identity(home / "keys" / "guys.key"), lambda n: bytes(n)).save(
        Ledger().after(Base.of(SECAGG), contribution)
    )
    write_site(home, roster=pinned)
    return home


def test_whose_update_could_be_uncovered_is_said_and_has_to_be_named(grown, capsys):
    four = ("guys", "marys", "north", "south")
    assert main(["site", "approve", "secret.toml", "--yes"]) == 0
    out = capsys.readouterr().out
    assert "nobody. The aggregator learns the sum" in out
    assert "could reveal the update of guys, marys, north, south" in out
    assert out.count("THIS SITE WILL REFUSE IT ALL THE SAME (lone-change)") == 2  # before the yes, and behind it
    assert load_site_file(grown / "site.toml").uncovers == {}
    named = [word for name in four for word in ("--uncovers", name)]
    assert " ".join(named) in out
    assert main(["site", "approve", "secret.toml", "--yes", *named]) == 0
    agreed = capsys.readouterr().out
    assert "YOU AGREE that its sums, compared with earlier ones, may reveal the update of guys" in agreed
    assert "WILL REFUSE" not in agreed
    assert load_site_file(grown / "site.toml").uncovers == {SECAGG.digest(): four}
    assert plans(grown) == (SECAGG.digest(),)  # one entry still
    assert main(["site", "approve", "secret.toml", "--yes", "--uncovers", "Not A Site"]) == 3
    assert load_site_file(grown / "site.toml").uncovers == {SECAGG.digest(): four}


ROWS = "where the rows of one site alone have, the difference is the change of that site's update"


def test_what_changed_rows_show_is_said_whenever_sums_are_approved_also_for_the_first_time(home, capsys):
    write_site(home, policy={"protect": ("sealed", "secagg")})
    assert main(["site", "approve", "sealed.toml", "--yes"]) == 0
    assert ROWS not in capsys.readouterr().out
    assert main(["site", "approve", "secret.toml", "--yes"]) == 0
    first = capsys.readouterr().out
    assert ROWS in first
    assert "within one" in first
    assert "after work for one this site refuses the other" in first  # the sealed plan has no sums


def test_other_plans_that_were_approved_on_one_base_model_are_named_before_any_sum(home, capsys):
    """Plans of another name, which train to the same bits, and of another number of rounds."""
    again = SECAGG.model_copy(update={"run": SECAGG.run.model_copy(update={"name": "second"})})
    longer = SECAGG.model_copy(update={"federation": SECAGG.federation.model_copy(update={"num_rounds": 4})})
    elsewhere = SECAGG.model_copy(
        update={"model": SECAGG.model.model_copy(update={"model_name_or_path": "other/base", "digest": "cd" * 32})}
    )
    write_site(home, models_too={"other/base": "y"}, plans=("ab" * 32,), policy={"protect": ("sealed", "secagg")})
    for name, plan in {"again": again, "longer": longer, "elsewhere": elsewhere}.items():
        (home / f"{name}.toml").write_text(dump_toml(plan))
    told = {}
    for name in ("secret", "again", "longer", "elsewhere", "again"):
        assert main(["site", "approve", f"{name}.toml", "--yes", "--json"]) == 0
        told[name] = json.loads(capsys.readouterr().out)["data"]["before"]
    one, two = f"plan {SECAGG.digest()[:12]} (", "is approved here on this base model too: "
    assert [line for line in told["longer"] if two in line and line.endswith("the same holds")] == [
        f"{one}{SECAGG.run.name}) {two}the same holds",
        f"plan {again.digest()[:12]} (second) {two}the same holds",
    ]
    assert f"{one}{SECAGG.run.name}) {two}its sums and this plan's are as of two runs of one plan" in told["again"]
    assert not [line for line in told["elsewhere"] if two in line]
    unknown = f"plan {'ab' * 6} is approved here and not known: it may be on this base model too"
    assert all(ROWS in lines[0] and lines.count(unknown) == 1 for lines in told.values())


def test_a_plan_with_sums_and_one_without_name_each_other(home, capsys):
    write_site(home, policy={"protect": ("sealed", "secagg")})
    told = {}
    for name in ("sealed", "secret", "sealed"):
        assert main(["site", "approve", f"{name}.toml", "--yes", "--json"]) == 0
        told[name] = " ".join(json.loads(capsys.readouterr().out)["data"]["before"])
    assert f"plan {SEALED.digest()[:12]} ({SEALED.run.name}) is approved here" in told["secret"]
    assert f"plan {SECAGG.digest()[:12]} ({SECAGG.run.name}) is approved here" in told["sealed"]
    assert "this site's update in that one, so that" in told["secret"]
    assert "this site's update in this one, so that" in told["sealed"]


@pytest.mark.attack(
    "C1c",
    "a plan of thousands of names, or of values of any length, whose own words push each other out of sight",
    stops="no list of a plan holds a value twice, and twelve values are shown: from its digest on, fewer than 100 rows of 80 "
    "columns",
)
@pytest.mark.parametrize("first", [SEALED, SECAGG])
@pytest.mark.parametrize("then", [SEALED, SECAGG])
def test_no_plan_is_so_long_that_its_words_leave_the_screen(home, first, then, capsys):
    """As many names and as many changed keys as a plan can hold, beside an earlier plan and earlier sums of such a one."""

    def long(plan, word):
        targets = tuple(f"{word}{n:03}".ljust(200, "x") for n in range(120))
        few = {"train/loss": ("train/loss",), "eval": ("eval/nll", "eval/examples")}
        changes = {
            "lora": {"target_modules": targets, "ranks": {}},
            "evaluation": {"share": few["eval" if word == "b" else "train/loss"]},
            "training": {"max_grad_norm": 7.0 if word == "b" else 3.0, "max_length": 64 + ord(word)},
            "model": {"revision": word * 200},
        }
        return plan.model_copy(update={k: getattr(plan, k).model_copy(update=v) for k, v in changes.items()})

    write_site(home, policy={"protect": ("sealed", "secagg")})
    for word, plan in (("a", long(first, "a")), ("b", long(then, "b"))):
        assert len(plan.canonical()) > 20_000
        (home / "long.toml").write_text(dump_toml(plan))
        main(["site", "approve", "long.toml", "--yes"])
        out = capsys.readouterr().out
        assert sum(len(wrapped(line, 80).split("\n")) for line in out[out.index("\nplan ") :].splitlines()) < 100, word


FILLS = st.text(st.sampled_from("x\u754c\u0301\u00e4\u200b\x1b\U000e0001 \U0001f600"), min_size=1, max_size=7)
"""Narrow, wide, combining, ambiguous and unprintable characters: these are spelled out in up to ten."""


def seen_columns(text):
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


@pytest.mark.attack(
    "C1c",
    "the same with values of wide characters, which take two columns, or of such as are spelled out in ten",
    stops="values are cut by the columns that they can take once they are spelled out, not by their characters",
)
@pytest.mark.parametrize("plan", [SEALED, SECAGG], ids=["sealed", "secagg"])
@given(old=FILLS, new=FILLS)
@settings(max_examples=30)
@example(old="\u754c", new="\u754c")
@example(old="\u0301", new="\U000e0001")
def test_whatever_characters_a_plan_has_its_words_stay_on_the_screen(plan, old, new):
    def long(fill, word):
        def full(start):
            return (start + fill * 200)[:200]

        targets = tuple(full(f"{word}{n:02}") for n in range(13))
        lora = {"target_modules": targets, "ranks": dict.fromkeys(targets, 1) if plan is SEALED else {}}
        model = {"model_name_or_path": full("m"), "revision": full(word)}
        return plan.model_copy(update={"model": plan.model.model_copy(update=model), "lora": plan.lora.model_copy(update=lora)})

    was, now = long(old, "o"), long(new, "n")
    asked = Question(
        digest=now.digest(), words=in_words(now), last=in_words(was), changed=changed_keys(was, now), refusals=(), approved=0,
        begun=0, agreed=(), named=(), before=[], uncovered=[],
    )  # fmt: skip
    lines = [plain(line) for line in asked.lines(again=False)]
    begin = next(i for i, line in enumerate(lines) if line.startswith("plan "))
    for some, most in ((lines[begin:], 100), (lines[:begin], 40)):  # the plan; and above it, what is not as in the last one
        assert sum(len(wrapped(line, 80).split("\n")) for line in some) < most
        assert sum(-(-max(seen_columns(line), 1) // 80) for line in some) < most  # where a terminal cuts them itself
    assert all(columns(one.brief()) <= 60 + 2 + 80 + 4 + 80 for one in asked.changed)
    (targets,) = [one for one in asked.changed if one.key == "lora.target_modules"]
    assert " -> ['n00" in targets.brief()
    assert targets.whole().endswith(plain(list(now.lora.target_modules)))  # a program is told all


def rows_of(text):
    return [row for line in text[text.index("plan ") :].splitlines() for row in wrapped(line, 80).split("\n")]


@pytest.mark.attack(
    "C1c",
    "plan after plan on one base model, all approved, so that what is said of them moves the next one's words out of sight",
    stops="twelve of them are named, the last first, and how many more there are",
)
def test_however_many_plans_were_approved_the_words_of_the_next_stay_on_the_screen(home, capsys):
    for n in range(40):
        plan = SEALED.model_copy(update={"run": SEALED.run.model_copy(update={"name": f"learning-rate-sweep-{n:02}"})})
        (home / "next.toml").write_text(dump_toml(plan))
        assert main(["site", "approve", "next.toml", "--yes"]) == 0
        assert len(rows_of(capsys.readouterr().out)) < 100


@pytest.mark.attack(
    "C1c",
    "a group of 256 sites with long names, all of which a plan would uncover",
    stops="twelve names are shown, and how many more there are; a program is told all",
)
def test_a_large_group_moves_no_words_off_the_screen(home, capsys):
    me = load_identity(home / "keys" / "guys.key")
    sites = [me.public, *(Identity.generate(f"hospital-{n:03}".ljust(60, "x")).public for n in range(63))]
    server, carol = Identity.generate("server"), Identity.generate("carol")
    roster = SignedRoster(first_epoch(server.public, sites, [carol.public], group_size=64, now=int(time.time()))).sign(carol)
    write_site(home, roster=roster.roster.digest())
    memory = FileMemory(home / "state" / "memory")
    memory.put("roster", roster.dump())
    ContributionStore(memory, me, os.urandom).save(Ledger().after(Base.of(SECAGG), Contribution.of(sites, measure(SECAGG))))
    other = SECAGG.model_copy(update={"training": SECAGG.training.model_copy(update={"learning_rate": 0.5})})
    (home / "other.toml").write_text(dump_toml(other))
    main(["site", "approve", "other.toml", "--yes"])
    assert len(rows_of(capsys.readouterr().out)) < 100
    assert len(question(other, home / "site.toml").uncovered) > 60


def test_a_plan_that_lets_sums_differ_by_one_site_says_so_loudly(grown, capsys):
    loose = SECAGG.model_copy(update={"protect": Protect(mode="secagg", secagg={"lone_change": "allow"})})
    (grown / "loose.toml").write_text(dump_toml(loose))
    assert main(["site", "approve", "loose.toml", "--yes"]) == 5  # the policy says refuse
    assert "ALLOWED by single sites" in capsys.readouterr().out


def test_a_plan_that_is_unlike_those_that_were_given_to_on_its_base_is_not_approved(grown, capsys):
    site = load_site_file(grown / "site.toml")
    loose = SECAGG.model_copy(update={"protect": Protect(mode="secagg", secagg={"lone_change": "allow"})})
    (grown / "loose.toml").write_text(dump_toml(loose))
    write_site(grown, roster=site.roster, policy={"lone_change": "allow"})
    assert main(["site", "approve", "loose.toml", "--yes"]) == 5
    assert "plans with lone_change = 'refuse', and this plan says 'allow'" in capsys.readouterr().out
    assert plans(grown) == ()


def test_without_a_roster_it_is_said_that_nothing_can_be_said(grown):
    for file in FileMemory(grown / "state" / "memory").files("roster"):
        file.unlink()
    found = question(SECAGG, grown / "site.toml")
    assert found.uncovered is None
    assert any("no roster" in line for line in found.lines(again=False))


# --- the file -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        'name = "a"\n[data]\npath = "x"  # ours\n',
        "",
        '# head\nplans = [\n  "' + "ab" * 32 + '",  # the first\n]\n\n[uncovers]\n"' + "ab" * 32 + '" = ["b"]\n\n[data]\n',
        'plans=[]\nuncovers = {}\n[policy]\nprotect = ["secagg"]\n',
    ],
)
def test_an_approval_finds_its_place_in_any_site_file(text):
    before = tomllib.loads(text)
    after = with_approval(text, "cd" * 32, add=True, named=["x", "y"])
    table = tomllib.loads(after)
    assert table["plans"] == [*before.get("plans", []), "cd" * 32]
    assert table["uncovers"] == {**before.get("uncovers", {}), "cd" * 32: ["x", "y"]}
    assert {k: v for k, v in table.items() if k not in ("plans", "uncovers")} == {
        k: v for k, v in before.items() if k not in ("plans", "uncovers")
    }
    assert all(comment in after for comment in ("# ours", "# head", "# the first") if comment in text)


# --- planning ---------------------------------------------------------------------------------------------------------------


def test_check_says_what_a_federation_survives(home, capsys):
    assert main(["check", "secret.toml"]) == 0
    out = capsys.readouterr().out
    assert "may be away" in out
    assert "excludes the others of its group" in out
    assert main(["check", "secret.toml", "--json"]) == 0
    found = {s["sites"]: s for s in json.loads(capsys.readouterr().out)["data"]["survives"]}
    assert (found[3]["away"], found[6]["away"], found[10]["away"]) == (0, 1, 2)
    assert (found[5]["lost"], found[20]["lost"]) == (0, 1)
    main(["check", "sealed.toml", "--json"])
    assert "survives" not in json.loads(capsys.readouterr().out)["data"]
