"""Records: what is written is what is read, and what was not written is refused by name, with its line."""

import json
import math
import re
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from pydantic import BaseModel
from raising import raising
from vectors import make_records
from vectors.make_records import read_record

from fedlora.answers import ANSWERS
from fedlora.cli.schema import schema_of
from fedlora.core.claims import PrivacyClaim
from fedlora.core.errors import FedLoRAError, StoreError, WireError
from fedlora.core.events import FACTS, Event, dump_facts_of, parse_event
from fedlora.core.records import (
    ArmRecord,
    ArmSeconds,
    Bytes,
    Check,
    General,
    Numbers,
    Outcome,
    Proof,
    Results,
    RoundRecord,
    Score,
    Seconds,
    Traffic,
)
from fedlora.core.tables.audited import AuditRecord, MeasuredStratum, Opening, Stratum
from fedlora.core.tables.personal import Candidate, Choice
from fedlora.formats.files import Damaged, dump_facts
from fedlora.formats.published.records import Example, Prompt, Published
from fedlora.formats.records import dump_round, dump_text, facts_of, parse_round, parse_text, scan_rounds

FORMAT = (Path(__file__).resolve().parents[1] / "fedlora" / "FORMAT.md").read_text()

numbers = st.floats(allow_nan=False, allow_infinity=False)
seconds = st.floats(min_value=0, allow_nan=False, allow_infinity=False)
counts = st.integers(0, 2**70)
names = st.text(max_size=12)
digests = st.integers(0, 2**256 - 1).map("{:064x}".format)
metrics = st.dictionaries(names, numbers, max_size=3)


def by_name(values):
    return st.dictionaries(names, values, max_size=3)


def maybe(values):
    return st.none() | values


site_numbers = st.builds(Numbers, weight=maybe(counts), metrics=metrics)
rounds = st.builds(
    RoundRecord,
    kind=st.sampled_from(["train", "evaluate"]),
    round=st.integers(1, 2**40),
    attempt=counts,
    asked=st.lists(names, max_size=3).map(tuple),
    sites=by_name(site_numbers),
    missing=by_name(names),
    together=maybe(site_numbers),
    majority=metrics,
    partial=st.booleans(),
    void=maybe(names),
    bytes=st.builds(Bytes, down=by_name(counts), up=by_name(counts)),
    seconds=st.builds(Seconds, round=seconds, aggregate=seconds),
    outcome=maybe(st.builds(Outcome, weight=counts, adapter=digests, rule=metrics)),
)
scores = st.builds(
    Score, nll=maybe(numbers), exact_match=maybe(numbers), coarse_match=maybe(numbers), tokens=counts, examples=counts
)
arms = st.builds(
    ArmRecord,
    sites=by_name(scores),
    general=maybe(st.builds(General, nll=maybe(numbers))),
    tokens=counts,
    steps=maybe(counts),
    learning_rate=maybe(numbers),
    seconds=st.builds(ArmSeconds, train=numbers, steps=maybe(numbers), evaluate=numbers),
)
any_json = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | numbers | names, lambda x: st.lists(x, max_size=2) | by_name(x)
)
results = st.builds(
    Results,
    name=names,
    seed=counts,
    plan=names,
    split=names,
    sites=st.lists(names, max_size=3).map(tuple),
    arms=by_name(arms),
    rounds=st.lists(rounds, max_size=2).map(tuple),
    traffic=maybe(st.builds(Traffic, up=counts, down=counts, base=counts, adapter=counts)),
    seconds=metrics,
    environment=by_name(names | st.integers(-(2**60), 2**60)),
    dataset=maybe(by_name(any_json)),
)
prompts = st.builds(
    Prompt,
    kind=st.sampled_from(["any", "chat", "plain"]),
    max_length=st.integers(1, 2**40),
    template=maybe(digests),
    stop=maybe(st.lists(names, max_size=3).map(tuple)),
    example=maybe(st.builds(Example, prompt=names, completion=names)),
)
above_zero = st.floats(0, 1e9, exclude_min=True)
claims = st.builds(
    PrivacyClaim,
    epsilon=above_zero,
    clip_norm=above_zero,
    noise_multiplier=above_zero,
    delta=st.floats(0, 1, exclude_min=True, exclude_max=True),
    sampling_rate=st.floats(0, 1, exclude_min=True),
    releases=counts,
    sum_of=st.integers(1, 256),
    own_epsilon=maybe(above_zero),
    units_per_site=counts,
    relation=names,
    accountant=names,
)
rates = st.floats(0, 1)
audits = st.builds(
    AuditRecord,
    run=names,
    plan=digests,
    adapter=digests,
    sites=counts,
    score=st.sampled_from(["loss", "ratio"]),
    confidence=st.floats(0, 1, exclude_min=True, exclude_max=True),
    delta=st.floats(0, 1, exclude_min=True, exclude_max=True),
    strata=st.lists(
        st.builds(
            Stratum, repeats=st.integers(1, 99), canaries=counts, guesses=counts, right=counts, bound=seconds, largest=seconds
        ),
        max_size=2,
    ).map(tuple),
    bound=seconds,
    largest=seconds,
    claimed=maybe(above_zero),
    measured=maybe(
        st.lists(
            st.builds(
                MeasuredStratum,
                repeats=st.integers(1, 99),
                members=counts,
                others=counts,
                auc=rates,
                tpr_1=rates,
                tpr_01=rates,
                exposure=maybe(seconds),
                chance=seconds,
                candidates=counts,
                tried=counts,
                extracted=counts,
                extracted_base=counts,
            ),
            max_size=2,
        ).map(tuple)
    ),
    verdict=st.sampled_from(["failed", "not-auditable", "nothing-found"]),
    reasons=st.lists(names, max_size=2).map(tuple),
    said=st.lists(names, max_size=2).map(tuple),
)
openings = st.builds(Opening, run=names, plan=digests, site=names, seed=digests, nonce=digests)
published = st.builds(
    Published,
    of=st.sampled_from(["federation", "site"]),
    run=names,
    plan=digests,
    base=names,
    adapter=digests,
    aggregate=names,
    protection=names,
    seed=counts,
    rounds=maybe(counts),
    complete=maybe(st.booleans()),
    sites=maybe(counts),
    share=names,
    prompt=prompts,
    privacy=maybe(claims),
    audit=maybe(audits),
    dtype=st.sampled_from(["bfloat16", "float16"]),
)
IN_WORDS = {"where": "the file", "hint": "the way on"}


# --- what is written is what is read ---------------------------------------------------------------------------------


@given(rounds)
def test_a_round_is_read_as_it_was_written(record):
    line = dump_round(record)
    again = parse_round(line, **IN_WORDS)
    assert again == record
    assert dump_round(again) == line
    assert b"\n" not in line


@given(st.one_of(arms, results, published, prompts, audits, openings))
def test_a_file_is_read_as_it_was_written(record):
    blob = dump_text(record)
    again = parse_text(type(record), blob, **IN_WORDS)
    assert again == record
    assert dump_text(again) == blob


@given(st.lists(rounds, max_size=3), st.data())
def test_a_file_of_rounds_cut_anywhere_gives_the_rounds_before_the_cut(records, data):
    blob = b"".join(dump_round(r) + b"\n" for r in records)
    at = data.draw(st.integers(0, len(blob)))
    whole = blob[:at].count(b"\n") + (at < len(blob) and blob[at : at + 1] == b"\n" and at > 0 and blob[at - 1 : at] != b"\n")
    assert list(scan_rounds(blob[:at], Path("rounds.jsonl"), hint="")) == records[:whole]


@given(rounds, st.data())
def test_a_changed_byte_is_damage_and_never_another_record(record, data):
    line = bytearray(dump_round(record))
    at = data.draw(st.integers(0, len(line) - 1))
    line[at] ^= 1 << data.draw(st.integers(0, 6))
    with suppress(Damaged):
        assert parse_round(bytes(line), **IN_WORDS) == record  # another spelling of the same


# --- what was not written is refused -----------------------------------------------------------------------------------


RECORD = RoundRecord(
    kind="train",
    round=2,
    attempt=0,
    asked=("a", "b", "c"),
    sites={"a": Numbers(weight=30, metrics={"train/loss": 0.5}), "b": Numbers(weight=10, metrics={"train/loss": 1.5})},
    missing={"c": "late"},
    together=None,
    majority={"a": 0.75},
    partial=True,
    void=None,
    bytes=Bytes(down={"a": 400, "b": 400, "c": 400}, up={"a": 100, "b": 100}),
    seconds=Seconds(round=1.5, aggregate=0.25),
    outcome=Outcome(weight=40, adapter="0f" * 32, rule={"gap/ratio": 0.125}),
)


def fields(kind, before=()):
    """All fields of a record, nested ones by their path."""
    for name, field in kind.model_fields.items():
        yield (*before, name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from fields(field.annotation, (*before, name))


def parsed(facts):
    return parse_round(dump_facts(facts), **IN_WORDS)


def at(facts, path):
    for key in path[:-1]:
        facts = facts[key]
    return facts, path[-1]


@pytest.mark.parametrize("path", [p for p in fields(RoundRecord) if p != ("format",)], ids=".".join)
def test_a_round_with_a_field_too_few_is_damaged_although_its_digest_is_right(path):
    facts = facts_of(RECORD)
    table, key = at(facts, path)
    del table[key]
    with pytest.raises(Damaged, match=re.escape(".".join(path))) as error:
        parsed(facts)
    assert (error.value.code, error.value.hint) == ("store", "the way on")


@pytest.mark.parametrize("path", [(), ("bytes",), ("seconds",), ("outcome",), ("sites", "a")], ids=".".join)
def test_a_field_that_is_not_known_is_refused(path):
    facts = facts_of(RECORD)
    table = facts
    for key in path:
        table = table[key]
    table["more"] = 1
    with pytest.raises(Damaged, match="more"):
        parsed(facts)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("round",), 0),
        (("round",), "2"),
        (("round",), True),
        (("partial",), 1),
        (("asked",), "abc"),
        (("kind",), "both"),
        (("outcome", "adapter"), "0F" * 32),
        (("bytes", "up", "a"), -1),
        (("sites", "a", "weight"), 1.5),
        (("seconds", "round"), -0.5),
        (("format",), "1"),
        (("format",), True),
        (("format",), 1.0),
    ],
)
def test_a_value_of_another_type_is_refused(path, value):
    facts = facts_of(RECORD)
    table, key = at(facts, path)
    table[key] = value
    with pytest.raises(Damaged, match=re.escape(".".join(path))):
        parsed(facts)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_what_is_no_number_is_refused(value):
    blob = json.dumps(facts_of(ARM)).replace("0.25", value).encode()
    with pytest.raises(Damaged):
        parse_text(ArmRecord, blob, **IN_WORDS)
    with pytest.raises(ValueError, match="finite"):
        Score(nll=math.inf, exact_match=None, coarse_match=None, tokens=0, examples=0)


ARM = ArmRecord(
    sites={"a": Score(nll=0.25, exact_match=0.5, coarse_match=None, tokens=10, examples=5)},
    general=General(nll=2.0),
    tokens=100,
    steps=4,
    learning_rate=0.001,
    seconds=ArmSeconds(train=2.0, steps=1.0, evaluate=0.5),
)


def results_of_a_simulation():
    """One seed with the arm ``federated`` alone."""
    return Results(
        name="toy",
        seed=0,
        plan="1a" * 32,
        split="test",
        sites=("a", "b", "c"),
        arms={"federated": ARM},
        rounds=(RECORD, RECORD.model_copy(update={"kind": "evaluate", "round": 3, "outcome": None, "majority": {}})),
        traffic=Traffic(up=200, down=1200, base=10_000, adapter=400),
        seconds={"train federated": 2.0, "aggregate": 0.25, "evaluate arms": 0.5},
        environment={"fedlora": "0.1.0", "cores": 2},
        dataset={"name": "made up", "rows": 12},
    )


AUDITED = AuditRecord(
    run="2b" * 32,
    plan="1a" * 32,
    adapter="0f" * 32,
    sites=4,
    score="loss",
    confidence=0.95,
    delta=1e-5,
    strata=(Stratum(repeats=16, canaries=256, guesses=64, right=60, bound=1.5, largest=3.0),),
    bound=1.5,
    largest=3.0,
    claimed=None,
    measured=None,
    verdict="nothing-found",
    reasons=(),
    said=("This audit found epsilon >= 1.5.",),
)
CHOICE = Choice(
    start="0a" * 32,
    adapter="0b" * 32,
    chosen=Candidate(way="further", share=0.5, nats=0.75, distance=2.5, behind=0.5),
    tried=(
        Candidate(way="global", share=0.0, nats=1.0, distance=0.0, behind=3.0),
        Candidate(way="further", share=0.5, nats=0.75, distance=2.5, behind=0.5),
        Candidate(way="alone", share=1.0, nats=0.7, distance=9.0, behind=None),
    ),
    examples=12,
)
OPENED = Opening(run="2b" * 32, plan="1a" * 32, site="a", seed="5e" * 32, nonce="6f" * 32)
PUBLISHED = Published(
    of="federation",
    run="2b" * 32,
    plan="1a" * 32,
    base="3c" * 32,
    adapter="0f" * 32,
    aggregate="fedavg",
    protection="sealed",
    seed=0,
    rounds=2,
    complete=True,
    sites=2,
    share="AB",
    prompt=Prompt(
        kind="plain",
        max_length=184,
        template="4d" * 32,
        stop=("<|im_end|>",),
        example=Example(prompt="Question: What is the capital of France?\nAnswer:", completion=" Paris.<|im_end|>"),
    ),
    privacy=None,
    audit=None,
    dtype="bfloat16",
)


@pytest.mark.parametrize(("stated", "said"), [(2, "of format 2"), (0, "of format 0"), (None, "of no stated format")])
def test_another_format_is_refused_by_name_and_is_no_damage(stated, said):
    facts = {**facts_of(RECORD), "format": stated, "more": 1}
    if stated is None:
        del facts["format"]
    with raising(WireError, code="version-unsupported", match=said) as error:
        parsed(facts)
    assert "version of FedLoRA that wrote it" in error.value.hint
    with raising(WireError, code="version-unsupported", match="line 1"):
        list(scan_rounds(dump_facts(facts) + b"\n", Path("rounds.jsonl"), hint=""))


def test_a_damaged_line_is_named_by_its_number_and_the_others_are_read():
    good = dump_round(RECORD)
    blob = b"\n".join([good, good[:-9], b"", good, b"{}", good]) + b"\n"
    found = list(scan_rounds(blob, Path("run/rounds.jsonl"), hint="resume the run"))
    assert [r == RECORD for r in found] == [True, False, False, True, False, True]
    assert [str(e)[:34] for e in found if isinstance(e, FedLoRAError)] == [
        f"run/rounds.jsonl, line {n} is damaged"[:34] for n in (2, 3, 5)
    ]
    assert all(e.hint == "resume the run" for e in found if isinstance(e, StoreError))


@pytest.mark.parametrize("blob", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000, b'"x"', b"{}"])
def test_what_is_no_record_is_damaged(blob):
    for kind in (Results, ArmRecord, Published, Proof, Prompt):
        with pytest.raises(Damaged, match="the file"):
            parse_text(kind, blob, **IN_WORDS)
    with pytest.raises(Damaged, match="the file"):
        parse_round(blob, **IN_WORDS)


def test_a_record_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        RECORD.round = 3


# --- vectors and FORMAT.md -----------------------------------------------------------------------------------------------


VECTORS = sorted((Path(__file__).parent / "vectors" / "records").glob("*.txt"))


@pytest.mark.parametrize("path", VECTORS, ids=lambda p: p.stem)
def test_a_record_does_what_its_vector_says(path):
    head, text = read_record(path)
    file, where = head["file"], {"where": "the file", "hint": ""}
    if head["expect"] != "success":
        with pytest.raises(FedLoRAError) as error:
            read_as(file, text, where)
        assert error.value.code == head["expect"]
        return
    found = read_as(file, text, where)
    assert found if file in ("events", "answer") else (dump_round(found) if file == "rounds.jsonl" else dump_text(found)) == text


def read_as(file, text, where):
    if file == "rounds.jsonl":
        return parse_round(text, **where)
    if file == "events":
        line = json.loads(text)
        event, facts = parse_event(line["event"], json.dumps(line["data"]))
        assert event == Event.OTHER or dump_facts_of(event, facts) == line["data"]
        return event
    if file == "answer":
        Draft202012Validator(schema_of(json.loads(text)["command"].replace(" ", "-"))).validate(json.loads(text))
        return True
    return parse_text(
        {
            "results.json": Results,
            "fedlora_run.json": Published,
            "prompt.json": Prompt,
            "personal.json": Choice,
            "audit.json": AuditRecord,
            "opened.json": Opening,
        }[file],
        text,
        **where,
    )


def test_making_the_vectors_again_changes_none():
    for name, text in make_records.vectors():
        assert (VECTORS[0].parent / f"{name}.txt").read_bytes() == text, name
    assert {name for name, _ in make_records.vectors()} == {p.stem for p in VECTORS}


def test_every_condition_of_the_format_has_a_vector_with_its_code():
    table = set(re.findall(r"^\| `(record-[a-z-]+)`: .* \| `([a-z-]+)` \|$", FORMAT, re.MULTILINE))
    heads = [read_record(p)[0] for p in VECTORS]
    assert {(h["condition"], h["expect"]) for h in heads if h["expect"] != "success"} == table
    assert len(table) >= 6


def described(kind):
    """The fields of a record that FORMAT.md lists, in order."""
    section = FORMAT.split(f"\n**`{kind.__name__}`**")[1].split("\n**`")[0].split("\n###")[0]
    return re.findall(r"^\| `([a-z0-9_]+)` \|", section, re.MULTILINE)


@pytest.mark.parametrize(
    "kind",
    [
        RoundRecord,
        Numbers,
        Outcome,
        Results,
        ArmRecord,
        Score,
        Traffic,
        Published,
        Prompt,
        Example,
        Proof,
        Check,
        AuditRecord,
        Stratum,
        MeasuredStratum,
        Opening,
    ],
    ids=lambda k: k.__name__,
)
def test_the_format_lists_the_fields_of_every_record(kind):
    assert described(kind) == list(kind.model_fields)


def test_the_format_lists_every_event_with_its_facts_and_every_command():
    table = dict(
        re.findall(r"^\| ((?:`[a-z-]+`(?:, )?)+) \| (.*?) \|", FORMAT.split("\n### 11.5")[1].split("\n### ")[0], re.MULTILINE)
    )
    rows = [(event, facts) for events, facts in table.items() for event in re.findall(r"`([a-z-]+)`", events)]
    found = {event: re.findall(r"`([a-z0-9_]+)`", facts) for event, facts in rows}
    assert found == {str(e): list(kind.__annotations__) for e, kind in FACTS.items()}
    answers = FORMAT.split("\n### 11.6")[1]
    assert all(f"`{command}`" in answers for command in ANSWERS)
