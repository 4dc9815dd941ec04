"""A site's rows, from its files to tokens: what is read is told as it goes. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fedlora.core.errors import DataError
from fedlora.core.events import Event, Report
from fedlora.core.facts import Data
from fedlora.core.plan import Plan
from fedlora.core.tables.data import SiteData
from fedlora.data import (
    Conversation,
    ReadReport,
    Tokenizer,
    TokenReport,
    Tokens,
    also_bad,
    check_apart,
    check_bad,
    read,
    split,
    tokenize,
)
from fedlora.data.identifiers import Found, identifiers
from fedlora.site.site_file import load_site_file


def read_rows(path: Path | Sequence[Path], data: SiteData, report: Report, *, label_key: str = "") -> list[Conversation]:
    """Reads files as the site's ``[data]`` table says.

    Args:
        label_key: the column by which a simulation deals rows to its sites.

    Raises:
        DataError: see :func:`fedlora.data.read`.
    """
    return _counted_rows(path, data, report, label_key=label_key)[0]


def _counted_rows(
    path: Path | Sequence[Path], data: SiteData, report: Report, *, label_key: str = ""
) -> tuple[list[Conversation], ReadReport]:
    found, count = read(
        path,
        format=data.format,
        shape=data.shape,
        columns=data.columns,
        group_key=data.group_key,
        encoding=data.encoding,
        header=data.header,
        max_bad_share=data.max_bad_share,
        label_key=label_key,
    )
    head, *more = count.lines()
    report(Event.DATA, Data(file=count.path, lines=[head.removeprefix(f"{count.path}: "), *more]))
    return found, count


def load_tokens(
    data: SiteData, root: Path, *, tokenizer: Tokenizer, plan: Plan, report: Report
) -> tuple[list[Tokens], list[Tokens]]:
    """A site's examples for training and for evaluation, split by group unless it has files for evaluation.

    Args:
        root: directory against which the table's paths are resolved.

    Returns:
        For training; for evaluation, empty where no rows are held out: such a site takes part all the same.

    Raises:
        DataError: nothing to train on, more bad rows than the site file lets pass, or a group on both sides.
    """
    train, count = _counted_rows(data.paths(root), data, report)
    counts = [count, count]
    if paths := data.held_out_paths(root):
        held_out, counts[1] = _counted_rows(paths, data, report)
        check_apart(train, held_out)
    else:
        train, held_out = split(train, fraction=data.held_out_fraction, seed=plan.run.seed)
    trained, first = counted_tokens(tokenizer, train, data, plan=plan, report=report)
    evaluated, second = _held_out_tokens(tokenizer, held_out, data, plan=plan, report=report)
    if counts[0] is counts[1]:
        check_bad(also_bad(counts[0], first.bad + second), data.max_bad_share)
    else:
        check_bad(also_bad(counts[0], first.bad), data.max_bad_share)
        check_bad(also_bad(counts[1], second), data.max_bad_share)
    return trained, evaluated


def _held_out_tokens(
    tokenizer: Tokenizer, held_out: Sequence[Conversation], data: SiteData, *, plan: Plan, report: Report
) -> tuple[list[Tokens], tuple[tuple[int, str], ...]]:
    """The examples for evaluation and the bad rows among them."""
    why = "no held-out rows"
    if held_out:
        try:
            found, count = counted_tokens(tokenizer, held_out, data, plan=plan, report=report)
        except DataError as e:
            why = f"no held-out rows: {e}"
        else:
            return found, count.bad
    report(Event.DATA, Data(file="evaluation", lines=[f"{why}; this site trains, and evaluates nothing"]))
    return [], ()


def to_tokens(
    tokenizer: Tokenizer,
    conversations: Sequence[Conversation],
    data: SiteData,
    *,
    plan: Plan,
    report: Report,
    append_eos: bool = True,
) -> list[Tokens]:
    """As :func:`counted_tokens`, without the count."""
    return counted_tokens(tokenizer, conversations, data, plan=plan, report=report, append_eos=append_eos)[0]


def counted_tokens(
    tokenizer: Tokenizer,
    conversations: Sequence[Conversation],
    data: SiteData,
    *,
    plan: Plan,
    report: Report,
    append_eos: bool = True,
    name: str = "tokens",
) -> tuple[list[Tokens], TokenReport]:
    """Turns rows into tokens with the mask of what is trained, as the plan and the site's ``[data]`` table say.

    Args:
        name: under which it is told.

    Raises:
        DataError: see :func:`fedlora.data.tokenize`.
    """
    found, count = tokenize(
        conversations,
        tokenizer,
        max_length=plan.training.max_length,
        append_eos=append_eos,
        special_tokens=data.special_tokens,
        too_long=data.too_long,
        template_date=plan.training.template_date,
        prompt=plan.training.prompt if append_eos else "any",  # a general hold-out is prose, whatever the plan's rows are
    )
    report(Event.DATA, Data(file=name, lines=list(count.lines())))
    return found, count


def count_identifiers(site_file: Path, *, report: Report) -> list[Found]:
    """What looks like an identifier of a person in a site's rows, those for evaluation included. Needs no base.

    Raises:
        DataError: see :func:`fedlora.data.read`.
    """
    file, root = load_site_file(site_file), site_file.resolve().parent
    parts = [("", file.data.paths(root)), ("evaluation: ", file.data.held_out_paths(root))]
    return [
        replace(found, name=f"{prefix}{found.name}")
        for prefix, paths in parts
        if paths
        for found in identifiers(read_rows(paths, file.data, report))
    ]
