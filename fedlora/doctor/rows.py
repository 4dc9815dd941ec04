"""What is looked at in a site's rows, before a base is loaded: how many are used, which are left out, how they are divided."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from fedlora.core.errors import DataError
from fedlora.data import Conversation, ReadReport, check_apart, read, shares, split
from fedlora.doctor.files import check_data
from fedlora.doctor.findings import Found
from fedlora.learn.bases.digest import has_template
from fedlora.site.site_file import SiteFile


def data(file: SiteFile, root: Path, *, seed: int) -> Iterator[Found]:
    """The rows, read as they will be for training.

    Args:
        seed: by which rows are held out: ``run.seed`` of the plan.
    """
    try:
        check_data(file, root)
    except DataError as e:
        lacking = Found.of("data", "no-data", e, verdict="later")  # its disk may not be mounted yet
        yield lacking.lasting(sample="data.path" if file.is_sample("data") else "")
        return
    table = file.data
    try:
        train, report = read_rows(file, table.paths(root))
        reports, given = [report], table.held_out_paths(root)
        if given:
            held_out, second = read_rows(file, given)
            reports.append(second)
            check_apart(train, held_out)
        else:
            train, held_out = split(train, fraction=table.held_out_fraction, seed=seed)
    except DataError as e:
        yield Found.of("data", "bad-data", e)
        return
    if (chat := next((c for c in (*train, *held_out) if c.chat), None)) is not None and not _takes_chats(file, root):
        yield Found(
            "data", "bad-data", "wrong", f"these rows are chats (line {chat.line}), but no base in [models] has a chat template",
            "an instruction-tuned base, or rows with prompt and completion", "data",
        )  # fmt: skip
        return
    found = shares(train, held_out)
    rows = sum(r.rows for r in reports)
    used, dropped = found.train + found.held_out, sum(len(r.bad) for r in reports)
    yield Found.right(
        "data",
        f"{used:,} of {rows:,} rows are used, {dropped:,} left out; {found.groups:,} groups; {found.train:,} rows to train on, "
        f"{found.held_out:,} held out ({found.held_out / used:.0%})",
        rows=rows, used=used, dropped=dropped, groups=found.groups, train=found.train, held_out=found.held_out,
        asked=0.0 if given else table.held_out_fraction,
    )  # fmt: skip
    yield from _dropped(reports)
    if not table.group_key:
        yield Found(
            "data", "no-group-key", "note",
            "group_key is not set: rows of one patient or customer may stand on both sides, and the evaluation flatters",
            "set data.group_key to the column that says whose row it is",
        )  # fmt: skip
    if not given and (why := found.why_larger(table.held_out_fraction)):
        said = f"{found.held_out:,} of {used:,} rows are held out ({found.held_out / used:.0%}), asked for were "
        fix = "remove repeated rows, or name rows for evaluation in data.held_out_path"
        yield Found("data", "held-out-larger", "note", f"{said}{table.held_out_fraction:.0%}: {why}", fix)
    if found.held_out < file.policy.min_cell:
        yield Found(
            "data", "few-held-out", "note",
            f"{found.held_out:,} rows are held out, fewer than policy.min_cell = {file.policy.min_cell}: their evaluation leaves "
            "as zeros",
            "more rows, a larger data.held_out_fraction, or a smaller policy.min_cell; this site trains all the same",
        )  # fmt: skip


def _takes_chats(file: SiteFile, root: Path) -> bool:
    """Whether some base here has a chat template, or does not say by its files, as in GGUF."""
    return not file.models or any(has_template(root / where) is not False for where in file.models.values())


def read_rows(file: SiteFile, paths: Sequence[Path]) -> tuple[list[Conversation], ReadReport]:
    """The rows of these files, as the site file says.

    Raises:
        DataError: see :func:`fedlora.data.read`.
    """
    d = file.data
    return read(
        paths, format=d.format, shape=d.shape, columns=d.columns, group_key=d.group_key, encoding=d.encoding, header=d.header,
        max_bad_share=d.max_bad_share,
    )  # fmt: skip


def _dropped(reports: Sequence[ReadReport]) -> Iterator[Found]:
    for report in reports:
        if report.bad:
            said = f"{len(report.bad):,} of {report.rows:,} rows of {report.path} are left out: {'; '.join(report.reasons())}"
            yield Found("data", "rows-dropped", "note", said, "correct these rows, if they should count")
