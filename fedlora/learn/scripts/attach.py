"""A script with a transformers Trainer joins a federation: its rows and settings become files that all commands take.

Nothing is trained here, and the Trainer is not changed: a federation trains as its plan says, in FedLoRA's own loop, on rows that
a site file or a simulation names; what of the Trainer never runs is said.
What the Trainer would have trained on is compared with that, token by token.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from pydantic import ValidationError
from transformers.utils import cached_file

from fedlora.core.errors import ConfigError, DataError, ModelError, StoreError
from fedlora.core.events import Event
from fedlora.core.plan import Plan
from fedlora.core.tables.data import SiteData
from fedlora.core.told.wrong_keys import readable
from fedlora.core.toml import dump_toml
from fedlora.data import Conversation, Tokens
from fedlora.data.shapes import COLUMNS
from fedlora.formats.files import read_file, write_atomic
from fedlora.learn.rows import read_rows, to_tokens
from fedlora.learn.scripts.settings import not_called, not_taken, settings_of, steps_of
from fedlora.site.site_file import SiteFile, load_site_file

ROWS: Final = "rows.jsonl"
COMPARED: Final = 256
"""Rows whose tokens are compared with the Trainer's own, at most."""


@dataclass(frozen=True, slots=True)
class Attached:
    """What a Trainer has brought.

    Attributes:
        rows: file of its rows, for this user alone (mode 600).
        plan: of a study, for :func:`fedlora.simulate`; None at a site, where the federation's plan says how is trained.
        compared: rows whose tokens were compared with the Trainer's own, at most 256.
        same: those of them with the Trainer's token ids and labels.
        said: what was found, in sentences without any row's contents; ``print`` shows them.
    """

    rows: Path
    plan: Plan | None
    compared: int
    same: int
    said: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join(self.said)


def attach(
    trainer: Any,
    *,
    study: str | os.PathLike[str] = "",
    site: str | os.PathLike[str] = "",
    rows: Iterable[Mapping[str, Any]] | None = None,
    base: str | os.PathLike[str] = "",
    sites: int = 3,
    data: Mapping[str, Any] = {},
) -> Attached:
    """Brings what a transformers (or TRL) Trainer trains on into a federation: to simulate one, or to take part as a site.

    With ``study``, its rows are written as one pool, and a plan with its settings that deals them to ``sites`` virtual sites.
    With ``site``, its rows are written where that site file says that they are, and nothing else: the file's policy, approvals,
    base and way of reading rows rule as ever, and the plan of the federation says how is trained. Nothing is sent or trained.

    Args:
        trainer: its ``model``, ``args``, ``train_dataset``, ``processing_class`` and ``data_collator`` are read.
        study: directory to write ``rows.jsonl`` and ``plan.toml`` to.
        site: a site file, whose ``data.path`` is one JSONL file.
        rows: the rows with their text, where the Trainer's dataset has token ids alone; in the same order.
        base: directory of the base model; empty: where the Trainer's model was loaded from.
        sites: of the simulation.
        data: keys of the table ``[data]`` of a study, such as ``group_key`` and ``columns``; a site file has its own.

    Returns:
        What was written and found.

    Raises:
        ValueError: neither ``study`` nor ``site``, or both; or ``data`` with ``site``.
        ConfigError: the Trainer has settings that no plan can have, or the site file names no single JSONL file.
        DataError: the dataset has no text that FedLoRA reads, or :func:`fedlora.data.read` refuses its rows.
        ModelError: the base's directory is not known.
        StoreError: other rows or another plan are there already, on which runs may have begun.
    """
    study, site, base = os.fspath(study), os.fspath(site), os.fspath(base)
    if bool(study) == bool(site) or (site and data):
        raise ValueError("attach takes study=DIRECTORY, and data={...} with it; or site=SITE_FILE")
    if site:
        return _at_site(trainer, Path(site), rows)
    table, where = _table(data), Path(study)
    length = _max_length(trainer)
    plan = _plan(trainer, _base_of(trainer, base), table, sites=sites, max_length=length)
    _write_rows(where / ROWS, trainer.train_dataset if rows is None else rows, table)
    _write_new(where / "plan.toml", dump_toml(plan).encode(), "another plan")
    said: list[str] = []
    compared, same = _compared(trainer, where / ROWS, table, plan, said)
    if getattr(trainer, "eval_dataset", None) is not None:
        said.append("the Trainer's eval_dataset is not used: a simulation holds rows out of its own, by group")
    f = plan.federation
    said.append(
        f"the plan: rounds {f.num_rounds}, steps in a round {f.local_steps}, sites {sites}; a Trainer alone: {steps_of(trainer)}"
    )
    said += [*not_taken(trainer), *not_called(trainer)]
    said.append(f"next: fedlora simulate {where / 'plan.toml'}")
    return Attached(where / ROWS, plan, compared, same, tuple(said))


def _at_site(trainer: Any, path: Path, rows: Iterable[Mapping[str, Any]] | None) -> Attached:
    file, root = load_site_file(path), path.resolve().parent
    name = file.data.path
    if not isinstance(name, str) or not name.endswith(".jsonl") or set(name) & set("*?["):
        raise ConfigError(
            f"{path}: data.path = {name!r}: a Trainer's rows are written as one JSONL file",
            hint='data.path = "data/train.jsonl"',
        )
    target = root / name
    _write_rows(target, trainer.train_dataset if rows is None else rows, file.data)
    plan = Plan()
    plan = plan.model_copy(update={"training": plan.training.model_copy(update={"max_length": _max_length(trainer)})})
    said: list[str] = []
    compared, same = _compared(trainer, target, file.data, plan, said)
    if getattr(trainer, "eval_dataset", None) is not None:
        held = "data.held_out_path names" if file.data.held_out_path else f"{file.data.held_out_fraction:g} of the groups are"
        said.append(f"the Trainer's eval_dataset is not used: {held} what is held out here")
    said += [*_about_base(trainer, file, root), "how is trained is what the federation's plan says, not the Trainer's arguments"]
    said += not_called(trainer)
    said.append(f"next: fedlora site doctor {path}, then fedlora site up {path}")
    return Attached(target, None, compared, same, tuple(said))


def _about_base(trainer: Any, file: SiteFile, root: Path) -> list[str]:
    try:
        base = _base_of(trainer, "")
    except ModelError:
        return ["the Trainer's base is in no directory: `fedlora site doctor` looks at the one under [models]"]
    known = {(root / path).resolve() for path in file.models.values()}
    if base in known:
        return []
    return [f"the Trainer's base lies in {base}, which is none of [models]: `fedlora site doctor` compares those with the plan"]


# --- rows -----------------------------------------------------------------------------------------------------------


def _table(data: Mapping[str, Any]) -> SiteData:
    try:
        return SiteData.model_validate_json(json.dumps({**data, "path": ROWS}))
    except ValidationError as e:
        raise readable(e, SiteData, "attach(data=...)") from None


def _write_rows(path: Path, rows: Iterable[Mapping[str, Any]], data: SiteData) -> None:
    """Writes the columns that this table reads, and no other."""
    wanted = {data.columns.get(name, name) for name in COLUMNS} | {data.group_key} - {""}
    lines: list[bytes] = []
    for row in _each(rows):
        if not isinstance(row, Mapping):
            raise DataError("a row of the dataset is no mapping of columns", hint="pass rows=[{...}, ...]")
        kept = {key: row[key] for key in sorted(wanted) if row.get(key) is not None}
        if not lines and not kept.keys() - {data.group_key}:
            raise DataError(
                "the Trainer's dataset has no column with text that FedLoRA reads" + ", but token ids" * ("input_ids" in row),
                hint="pass the rows that it was made of, attach(trainer, rows=raw, ...); columns: messages, prompt and "
                "completion, or text; or name yours with columns",
            )
        lines.append(json.dumps(kept, ensure_ascii=False, default=str).encode())
    if not lines:
        raise DataError("the Trainer's dataset is empty")
    _write_new(path, b"\n".join(lines) + b"\n", "other rows")


def _each(rows: Any) -> Iterator[Any]:
    """The rows of whatever a Trainer takes: a list, a Dataset of datasets, one of torch, or a stream."""
    if hasattr(rows, "__len__") and hasattr(rows, "__getitem__"):
        return (rows[n] for n in range(len(rows)))
    return iter(rows)


def _write_new(path: Path, blob: bytes, what: str) -> None:
    """Writes a file, or finds these bytes in it: a script may run again."""
    there = read_file(path)
    if there is not None and there != blob:
        raise StoreError(
            f"{path} is there already, with {what}: runs that have begun count on it",
            hint="move it away, or choose another directory or data.path",
        )
    write_atomic(path, blob)


# --- tokens -----------------------------------------------------------------------------------------------------------


def _max_length(trainer: Any) -> int:
    """Most tokens of a row: what TRL's arguments say; else the longest row that is made of tokens already, or the default."""
    said = getattr(trainer.args, "max_length", None)
    if said:
        return max(int(said), 8)
    lengths = (len(row["input_ids"]) for row in _each(trainer.train_dataset) if isinstance(row, Mapping) and "input_ids" in row)
    longest = max(lengths, default=0)
    return max(-(-longest // 8) * 8, 8) if longest else Plan().training.max_length


def _compared(trainer: Any, path: Path, data: SiteData, plan: Plan, said: list[str]) -> tuple[int, int]:
    """How many rows were compared with what the Trainer would feed its model, and how many are the same; adds to ``said``."""

    def listen(event: Event, facts: Mapping[str, Any]) -> None:
        said.extend(facts["lines"] if event == Event.DATA else [])

    conversations = read_rows(path, data, listen)
    tokenizer = getattr(trainer, "processing_class", None)
    if tokenizer is None:
        said.append("tokens: not compared, the Trainer has no processing_class")
        return 0, 0
    ours = to_tokens(tokenizer, conversations, data, plan=plan, report=listen)
    written = sum(1 for line in path.read_bytes().split(b"\n") if line)
    dataset = trainer.train_dataset
    if not hasattr(dataset, "__len__") or len(dataset) != written:
        said.append(f"tokens: not compared, the Trainer's dataset does not have the {written:,} rows one by one (packing?)")
        return 0, 0
    return _counted(ours, conversations, list(itertools.islice(_fed(trainer), COMPARED)), said)


def _counted(
    ours: list[Tokens], rows: list[Conversation], theirs: list[tuple[np.ndarray, np.ndarray]], said: list[str]
) -> tuple[int, int]:
    mine = {example.line: example for example in reversed(ours)}  # of a long text, its first piece
    ids = both = 0
    first = 0
    for line, (input_ids, labels) in enumerate(theirs, 1):
        found = mine.get(line)
        same_ids = found is not None and np.array_equal(found.input_ids, input_ids)
        same = found is not None and same_ids and np.array_equal(found.labels[1:], labels[1:])
        ids, both = ids + same_ids, both + same
        first = first or (0 if same else line)
    text = f"tokens: {both:,} of {len(theirs):,} rows compared have the Trainer's token ids and labels"
    if both < len(theirs):
        text += f", {ids - both:,} its ids alone (other tokens are trained on); the first that differs is row {first:,}"
    said.append(text)
    return len(theirs), both


def _fed(trainer: Any) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Token ids and labels of each row as the Trainer's own collator makes them, without padding, in order."""
    for batch in trainer.get_eval_dataloader(trainer.train_dataset):
        if "labels" not in batch or "input_ids" not in batch:
            return
        ids, labels = batch["input_ids"].cpu().numpy(), batch["labels"].cpu().numpy()
        mask = batch["attention_mask"].cpu().numpy().astype(bool) if "attention_mask" in batch else np.ones(ids.shape, bool)
        for one, of, there in zip(ids, labels, mask, strict=True):
            yield one[there], of[there]


# --- plan ---------------------------------------------------------------------------------------------------------------


def _base_of(trainer: Any, said: str | Path) -> Path:
    """Directory of the base model's files.

    Raises:
        ModelError: the model was not loaded from a directory or from the cache of the Hub.
    """
    name = str(said) or str(getattr(trainer.model, "name_or_path", "") or "")
    if not name:
        raise ModelError("the Trainer's model was not loaded from a directory", hint="attach(..., base=DIRECTORY)")
    if Path(name).is_dir():
        return Path(name).resolve()
    try:
        return Path(cached_file(name, "config.json", local_files_only=True)).parent
    except OSError:
        raise ModelError(f"the base {name} is not on this machine", hint="attach(..., base=DIRECTORY)") from None


def _plan(trainer: Any, base: Path, data: SiteData, *, sites: int, max_length: int) -> Plan:
    name = str(getattr(trainer.model, "name_or_path", "") or "")
    public = base.name if not name or Path(name).exists() else name
    table = settings_of(trainer, sites=sites, max_length=max_length)
    table["model"] |= {"model_name_or_path": public}
    table["simulation"] = {
        "sites": sites, "split": "iid", "base": str(base), "data": data.model_dump(mode="json", exclude_defaults=True)
    }  # fmt: skip
    try:
        return Plan.model_validate_json(json.dumps(table))
    except ValidationError as e:
        raise readable(e, Plan, "the Trainer's settings as a plan") from None
