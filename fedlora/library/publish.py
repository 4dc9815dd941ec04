"""Publishes the result of a run as a PEFT adapter or a merged model, and describes any file of FedLoRA."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Literal

from fedlora.answers import Exported, Inspected, RunDone
from fedlora.core.adapter import Adapter
from fedlora.core.errors import ConfigError, FedLoRAError, StoreError, WrongContext
from fedlora.core.plan import Plan, parse_plan
from fedlora.core.records import Results
from fedlora.core.tables.personal import PERSONAL
from fedlora.data.prompt import unseen
from fedlora.formats.files import load_adapter, refuse_existing
from fedlora.formats.keys import Identity
from fedlora.formats.plans import load_plan, load_prompt
from fedlora.formats.published.records import Prompt, Published, RunFacts
from fedlora.formats.records import facts_of, parse_text
from fedlora.formats.signed_roster import load_roster
from fedlora.formats.state.audit import note
from fedlora.library.leakage import check_gate, inside, load_audit
from fedlora.library.signed import seal
from fedlora.privacy.claims import claim_of
from fedlora.rounds.best import chosen
from fedlora.rounds.server import load_server_key
from fedlora.rounds.store import RunStore
from fedlora.rules import rule_of

log = logging.getLogger(__name__)


def export_run(
    run: Path,
    out: Path,
    *,
    dtype: str,
    to: Literal["peft", "gguf"] = "peft",
    merge: bool = False,
    base: Path | None = None,
    with_base: bool = False,
    round: int | Literal["best", "last"] = "last",
) -> Exported:
    """Publishes a run's last adapter, signed by the server if the run lies in the server's directory, ``HOME/runs/NAME``.

    Args:
        run: a server's run directory, one seed of a simulation, or the file with a site's own adapter; in a simulation,
            ``seed-N/personal/SITE.safetensors``.
        out: directory to make; must not exist.
        dtype: bfloat16 or float16.
        to: ``peft``, or ``gguf``: for llama.cpp, which needs ``base``.
        merge: write the base with the adapter merged in, which needs ``base`` in full precision.
        with_base: write the base beside the adapter, as GGUF in bfloat16.
        round: the adapter after so many rounds, the one with the least held-out loss, or the last one.
        base: the base's directory; what the run does not know of prompts is then read from it.

    Returns:
        What was written, by whom it is signed, and what of the prompt is not known.

    Raises:
        StoreError: no run there, ``out`` exists, or the adapter after that round is not kept.
        KeyFileError: the server's key is damaged.
        AuditFailed: the plan asks for a leakage audit, which is missing or has found what stops the adapter.
        ConfigError: ``merge`` or ``gguf`` without ``base``, options that do not go together, or the run has no adapter for
            everybody.
        ModelError: the base is quantized, or not one that is written as GGUF.
        WrongContext (wrong-base): it is another one than the plan pins.
    """
    _check_options(to, merge=merge, with_base=with_base)
    refuse_existing(out)  # before anything is read or loaded
    signer = _signer(run)
    sealed = partial(seal, signer=signer) if signer else None
    plan, adapter, facts = _finished(run, round)
    if facts.of == "federation" and not run.is_file():  # a site has no audit; the coordinator has published already
        facts = _audited(run, plan, facts)
    if base is None and (merge or to == "gguf"):
        raise _without_base("--merge" if merge else "--to gguf", plan)
    if base is not None:
        _check_base(plan, base)
        facts = facts.model_copy(update={"prompt": _prompt(base, plan)})
    from fedlora.learn import export

    if merge and base is not None:
        export.merge(adapter, base, out, scale=plan.lora.scale, dtype=dtype)
        return _noted(run, signer, facts, _written(out, facts, by="", unknown=[]), kind="merged")
    if to == "gguf" and base is not None:
        from fedlora.learn.export.llama_cpp import export_gguf

        export_gguf(adapter, out, plan=plan, base=base, with_base=with_base, run=facts, dtype=dtype, seal=sealed)
    else:
        _export_peft(adapter, out, plan=plan, dtype=dtype, run=facts, seal=sealed)
    by = signer.public.fingerprint() if signer else ""
    return _noted(run, signer, facts, _written(out, facts, by=by, unknown=_unknown(facts.prompt)), kind=to)


def _audited(run: Path, plan: Plan, facts: RunFacts) -> RunFacts:
    """With what an audit has found of this very adapter.

    Raises:
        AuditFailed: the adapter may not be published.
    """
    found = load_audit(run)
    check_gate(plan, found, run=facts.run, adapter=facts.adapter)
    same = found is not None and (found.run, found.plan, found.adapter) == (facts.run, facts.plan, facts.adapter)
    return facts.model_copy(update={"audit": found if same else None})


def _written(out: Path, facts: RunFacts, *, by: str, unknown: list[str]) -> Exported:
    return Exported(out=str(out), signed_by=by or None, unknown=unknown, rounds=facts.rounds, complete=facts.complete)


def _noted(run: Path, signer: Identity | None, facts: RunFacts, done: Exported, *, kind: str) -> Exported:
    """What was written, once that stands in the log of the server in whose directory the run lies."""
    if signer is not None:
        place = run.resolve()
        adapter, rounds = facts.adapter, facts.rounds or 0
        note(
            place.parent.parent,
            "export",
            run=place.name,
            id=facts.run,
            rounds=rounds,
            adapter=adapter,
            kind=kind,
            out=done["out"],
        )
    return done


def _check_options(to: str, *, merge: bool, with_base: bool) -> None:
    if merge and to != "peft":
        raise ConfigError(
            "--merge writes a Hugging Face directory, not GGUF",
            hint="leave --merge out: llama.cpp adds the adapter itself",
        )
    if with_base and to != "gguf":
        raise ConfigError("--with-base belongs to --to gguf", hint="PEFT loads the base's own directory")


def _export_peft(
    adapter: Adapter, out: Path, *, plan: Plan, dtype: str, run: RunFacts, seal: Callable[[Path, Published], None] | None
) -> None:
    from fedlora.learn import export

    export.export_adapter(
        adapter,
        out,
        lora=plan.lora,
        base_model=plan.model.model_name_or_path,
        revision=plan.model.revision,
        dtype=dtype,
        quantization=plan.model.quantization,
        run=run,
        seal=seal,
    )


def _without_base(option: str, plan: Plan) -> ConfigError:
    name = plan.model.model_name_or_path
    return ConfigError(f"{option} needs --base", hint=f"give --base the full-precision directory of {name}")


def exported_lines(done: Exported, *, to: str, merge: bool, with_base: bool) -> list[str]:
    """What came of :func:`export_run`, and what is missing, for people."""
    after = (
        ""
        if done["rounds"] is None
        else f", after round {done['rounds']}{'' if done['complete'] else ': NOT THE LAST of its plan'}"
    )
    out, lines = done["out"], [f"written: {done['out']}{after}"]
    if merge:
        return lines
    if done["signed_by"]:
        lines.append(f"signed by this server, fingerprint {done['signed_by']}")
    else:
        lines.append(
            "NOT SIGNED: the run does not lie in the directory of a server (HOME/runs/NAME), so no server's key is at hand"
        )
    if "prompt" in done["unknown"]:
        lines.append(
            "fedlora_run.json does not say whether to ask in chats or in plain text: the plan's training.prompt is 'any'"
        )
    if "stop" in done["unknown"]:
        lines.append("fedlora_run.json has no chat template, stop tokens or example: give the base with --base")
    if to == "gguf":
        base = f"{out}/base.gguf" if with_base else "BASE.gguf"
        lines += ["", f"  llama-server -m {base} --lora {out}/adapter.gguf"]
    else:
        lines += ["", "  from peft import PeftModel", f'  model = PeftModel.from_pretrained(base, "{out}")']
    return lines


def _signer(run: Path) -> Identity | None:
    """The keys of the server in whose directory a run lies."""
    home = run.resolve().parent.parent
    return load_server_key(home) if home / "runs" == run.resolve().parent and (home / "server.key").exists() else None


def _prompt(base: Path, plan: Plan) -> Prompt:
    from fedlora.data.prompt import prompt_of
    from fedlora.learn.base import tokenizer_of

    return prompt_of(tokenizer_of(plan.model, base), plan)


def _unknown(prompt: Prompt) -> list[str]:
    """What a program that serves the adapter will not learn from it."""
    kind = ["prompt"] if prompt.kind == "any" else []
    return kind + (["template", "stop", "example"] if prompt.stop is None else [])


def _check_base(plan: Plan, base: Path) -> None:
    from fedlora.learn.bases.digest import base_digest

    found = base_digest(base, plan.model)
    if found != plan.model.digest:
        raise WrongContext(
            f"the adapter was trained on base {plan.model.digest[:12]}, {base} holds {found[:12]}",
            hint=f"give --base the directory of {plan.model.model_name_or_path} that `fedlora pin` read or made from a GGUF file",
            code="wrong-base",
        )


def _finished(run: Path, round: int | Literal["best", "last"]) -> tuple[Plan, Adapter, RunFacts]:
    """The plan, the chosen adapter, and how it came to be."""
    if run.is_file():
        if round != "last":
            raise ConfigError("a site's own adapter has no rounds to choose from", hint="leave --best and --round out")
        return _own(run)
    store = RunStore.open(next((d for d in inside(run) if d.is_dir()), run))
    if rule_of(store.plan).keeps_local_factor:
        raise ConfigError(
            "aggregate.fedavg.share = 'A': every site has its own B, so there is no global adapter",
            hint="run `fedlora export STATE/journal/RUN.safetensors OUT` at a site: it writes that site's PEFT adapter",
        )
    if round == "last":
        at = store.load()
        done, adapter = at.round, at.adapter
    else:
        done, adapter = chosen(store, round)
    prompt = load_prompt(store.directory / "plan.json")
    facts = RunFacts(
        of="federation",
        run=store.run,
        plan=store.plan.digest(),
        base=store.plan.model.digest,
        adapter=adapter.digest(),
        aggregate=store.plan.aggregate.name,
        protection=store.plan.protect.mode,
        seed=store.plan.run.seed,
        rounds=done,
        complete=done == store.plan.federation.num_rounds,
        sites=_sites(store, done),
        share=rule_of(store.plan).down(),
        prompt=prompt or unseen(store.plan),
        privacy=claim_of(store.plan),
        audit=None,
    )
    return store.plan, adapter, facts


def _sites(store: RunStore, rounds: int) -> int | None:
    """How many sites counted in some round; None where the record of a round is gone: a smaller number would be wrong."""
    try:
        records = [r for r in store.records() if r.round <= rounds]
    except StoreError as e:
        log.warning("%s; the number of sites is not known", e)
        return None
    return len({site for r in records for site in r.sites}) if {r.round for r in records} == {*range(1, rounds + 1)} else None


def _own(file: Path) -> tuple[Plan, Adapter, RunFacts]:
    """The same from what a site keeps for itself."""
    adapter, stored = load_adapter(file)
    if not isinstance(stored.get("plan"), str) or "run" not in stored:
        raise StoreError(f"{file} holds an adapter but not its plan", hint="give the run's directory instead")
    if len(file.stem) == 64 and stored["run"] != file.stem:
        raise StoreError(
            f"{file} holds the adapter of another run", hint="a site names the file after the run: ask for the right one"
        )
    plan = parse_plan(stored["plan"].encode())
    personal = stored.get(PERSONAL) is True
    alone = personal or rule_of(plan).keeps_local_factor  # else a site keeps it when the last round is done
    facts = RunFacts(
        of="site" if alone else "federation",
        run=str(stored["run"]),
        plan=plan.digest(),
        base=plan.model.digest,
        adapter=adapter.digest(),
        aggregate=plan.aggregate.name,
        protection=plan.protect.mode,
        seed=plan.run.seed,
        rounds=None if alone else plan.federation.num_rounds,
        complete=None if alone else True,
        sites=None,
        share=rule_of(plan).down(),
        prompt=unseen(plan),
        privacy=None if personal else claim_of(plan),  # trained further without noise
        audit=None,
    )
    return plan, adapter, facts


def outcome(run: Path) -> tuple[RunDone, list[str]]:
    """What came of a run: the rounds that were done and those of them without some site, for programs and in words.

    Raises:
        StoreError: no run there, or no checkpoint that is whole.
    """
    from fedlora.core.words import majority_line

    store = RunStore.open(run)
    rounds, records = store.load().round, store.records()
    partial = [r.round for r in records if r.partial]
    said = f"{len(partial)} of {rounds} rounds without some site" if partial else f"{rounds} rounds, every site in each"
    lines = [
        f"done: {run} ({said})",
        majority_line(records),
        f"next, where fedlora[train] is installed: fedlora export {run} adapter/",
    ]
    return RunDone(run=str(run), rounds=rounds, partial_rounds=partial), lines


def describe(path: Path) -> Inspected:
    """Names and sizes of one of our files; never values.

    Raises:
        StoreError: not one of ours.
    """
    with suppress(FedLoRAError):
        adapter, facts = load_adapter(path)
        return Inspected(kind="adapter", facts={"values": adapter.layout.size, "tensors": len(adapter.layout.entries), **facts})
    try:
        with path.open("rb") as file:
            head = file.read(4)
            rest = file.read() if head == b"FLSE" or path.suffix == ".json" else b""
    except OSError as e:
        raise StoreError(f"cannot read {path}: {e.strerror}") from None
    if head == b"FLSE":
        from fedlora.formats.envelope import parse

        header = parse(head + rest, max_bytes=1 << 34).header
        return Inspected(kind="envelope", facts=header.fields())
    size = {"bytes": path.stat().st_size}
    if head == b"FLUP":
        return Inspected(kind="update", facts=size)
    if head == b"FLTK":
        return Inspected(kind="task", facts=size)
    if head == b"FLJ3":
        return Inspected(kind="journal entry", facts=size)
    return _described_text(path, head + rest)


def _described_text(path: Path, blob: bytes) -> Inspected:
    with suppress(FedLoRAError, ValueError):
        plan = load_plan(path) if path.suffix == ".toml" else parse_plan(blob)
        return Inspected(kind="plan", facts={"digest": plan.digest(), "name": plan.run.name})
    with suppress(FedLoRAError):
        signed = load_roster(path)
        facts = {"digest": signed.roster.digest(), "epoch": signed.roster.epoch, "sites": list(signed.roster.active())}
        return Inspected(kind="roster", facts=facts)
    with suppress(FedLoRAError):
        run = parse_text(Results, blob, where=str(path), hint="")
        return Inspected(kind="results", facts={"name": run.name, "seed": run.seed, "plan": run.plan, "arms": [*run.arms]})
    with suppress(FedLoRAError):
        published = parse_text(Published, blob, where=str(path), hint="")
        return Inspected(kind="published run", facts=facts_of(published))
    with suppress(ValueError):
        found = json.loads(blob)
        return Inspected(kind="JSON", facts={"keys": sorted(found) if isinstance(found, dict) else type(found).__name__})
    raise StoreError(f"{path} is not a file of FedLoRA")
