"""A site's rows, from its files to tokens: what is read is told as it goes. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedlora.core.errors import ConfigError, DataError
from fedlora.core.events import Event, Report
from fedlora.core.facts import Data
from fedlora.core.plan import Plan
from fedlora.data import Conversation, Tokenizer, Tokens, check_apart, read, split, tokenise
from fedlora.site.site_file import SiteData

_SPLITS = ("train", "validation", "test")
_GENERAL = "general.jsonl"  # hold-out that has nothing to do with the task: what does training make the model forget?


def read_rows(path: Path, data: SiteData, report: Report) -> list[Conversation]:
    """Reads one file as the site's ``[data]`` table says.

    Raises:
        DataError: see :func:`fedlora.data.read`.
    """
    found, count = read(path, format=data.format, shape=data.shape, columns=data.columns, group_key=data.group_key)
    report(Event.DATA, Data(file=path.name, lines=list(count.lines())))
    return found


def read_both(data: SiteData, root: Path, *, seed: int, report: Report) -> tuple[list[Conversation], list[Conversation]]:
    """A site's rows for training and for evaluation, split by group unless it has a file for evaluation.

    Args:
        root: directory against which the table's paths are resolved.
        seed: of the run: which groups are held out follows from it.

    Raises:
        DataError: nothing to train on, nothing to evaluate on, or a group on both sides.
    """
    train = read_rows(root / data.path, data, report)
    if data.held_out_path:
        held_out = read_rows(root / data.held_out_path, data, report)
        check_apart(train, held_out)
    else:
        train, held_out = split(train, fraction=data.held_out_fraction, seed=seed)
    if not held_out:
        raise DataError("no rows are held out for evaluation", hint="set data.held_out_fraction or data.held_out_path")
    return train, held_out


def to_tokens(
    tokenizer: Tokenizer, conversations: Sequence[Conversation], *, plan: Plan, report: Report, append_eos: bool = True
) -> list[Tokens]:
    """Turns rows into tokens with the mask of what is trained.

    Raises:
        DataError: see :func:`fedlora.data.tokenise`.
    """
    found, count = tokenise(conversations, tokenizer, max_length=plan.training.max_length, append_eos=append_eos)
    report(Event.DATA, Data(file="tokens", lines=list(count.lines())))
    return found


def load_splits(
    data: Path, sites: Sequence[str], *, tokenizer: Tokenizer, plan: Plan, report: Report
) -> tuple[dict[str, dict[str, list[Tokens]]], list[Tokens]]:
    """For a comparison: site -> split -> tokens, and the general hold-out; from ``SITE.train.jsonl`` and so on in a directory.

    Raises:
        ConfigError, DataError: a file is missing or unusable.
    """

    def tokens(path: Path, append_eos: bool = True) -> list[Tokens]:
        if not path.exists():
            raise ConfigError(f"{path} does not exist", hint="simulation.data names a directory with SITE.train.jsonl and so on")
        return to_tokens(tokenizer, read_rows(path, SiteData(), report), plan=plan, report=report, append_eos=append_eos)

    rows = {s: {p: tokens(data / f"{s}.{p}.jsonl") for p in _SPLITS} for s in sites}
    return rows, tokens(data / _GENERAL, append_eos=False) if (data / _GENERAL).exists() else []
