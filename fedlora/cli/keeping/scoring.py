"""`fedlora evaluate`: whether an adapter helps on rows at hand."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedlora.cli.output import Json, Quiet, Screen, emit

if TYPE_CHECKING:
    from fedlora.answers.keeping import Evaluation
    from fedlora.core.tables.data import SiteData
    from fedlora.learn.published.score import Scored
    from fedlora.learn.published.sides import Side, Writing


def evaluate(
    adapter: Annotated[Path, typer.Argument(help="PEFT directory, from `fedlora site pull` or `fedlora export`.")],
    base: Annotated[Path, typer.Option(help="Directory of the base model, in full precision.")],
    on: Annotated[list[Path], typer.Option(help="File, directory or pattern of rows; give it again for more of them.")],
    site: Annotated[
        Path | None,
        typer.Option(help="Site file whose [data] says how the rows are read; default: by their columns.", show_default=False),
    ] = None,
    labels: Annotated[
        str, typer.Option(help="All answers that there can be, by commas: then labels are scored, too.", show_default=False)
    ] = "",
    generate: Annotated[int, typer.Option(min=0, help="Write out so many answers, and compare their words.")] = 0,
    show: Annotated[int, typer.Option(min=0, help="Print so many examples with both answers.")] = 0,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Compare an adapter with its base on rows at hand, on this machine.

    Loss and exact answers of both, with a 95 % interval and what chance alone would do; with --labels accuracy, F1 and
    calibration where nothing but a label may be said; with --generate token F1 and ROUGE of written answers, which takes time.
    Rows are put as they were trained. Give rows that no run has trained on. Nothing is sent or logged; --show prints texts of
    rows, on this screen only.

    Example: fedlora evaluate adapter --base models/SmolLM2 --on test.jsonl
    """
    from fedlora.core.tables.data import SiteData
    from fedlora.formats.published.directory import check_there

    check_there(adapter, base)
    data = _data_of(site, on) if site is not None else SiteData()
    from fedlora.learn.published.score import score  # which takes seconds to load

    with Screen(quiet=quiet, as_json=json) as screen:
        words = [label.strip() for label in labels.split(",")] if labels else []
        found = score(adapter, base, on, data=data, labels=words, write=generate, show=show, report=screen)
    emit(_evaluation(found), [*found.lines(), *_examples(found)], as_json=json)


def _data_of(site: Path, on: list[Path]) -> SiteData:
    """How a site's rows are read.

    Raises:
        ConfigError: the rows to score are those that this site trains on.
    """
    from fedlora.core.errors import ConfigError
    from fedlora.site.site_file import load_site_file

    data = load_site_file(site).data
    own = set(_files(data.paths(site.resolve().parent)))
    if trained := [path for path in _files(on) if path in own]:
        raise ConfigError(
            f"{trained[0].name} is of data.path of {site}: this site trains on most of its rows, and they say nothing about new "
            "ones",
            hint="give rows that no run has trained on, as those of data.held_out_path",
        )
    return data


def _files(paths: Iterable[Path]) -> list[Path]:
    """What files, directories and patterns mean; what is not there is said when it is read."""
    from fedlora.core.errors import DataError
    from fedlora.data.files.sources import find

    found = []
    for path in paths:
        with suppress(OSError, DataError):
            found += [file.resolve() for file in find(path)[0]]
    return found


def _examples(found: Scored) -> list[str]:
    lines = []
    for one in found.shown:
        lines += ["", f"line {one.line}: ...{one.prompt}", f"  expected: {one.expected}", f"  base:     {one.base}"]
        lines += [f"  adapter:  {one.adapter}"]
    return lines


def _evaluation(found: Scored) -> Evaluation:
    from fedlora.answers.keeping import Evaluation, ShownExample, SideScored

    def side(one: Side, writing: Writing | None) -> SideScored:
        labeled, w = one.labeled, writing
        return SideScored(
            nll=found.nll(one),
            exact=int(one.right.sum()),
            accuracy=labeled.accuracy if labeled else None,
            macro_f1=labeled.macro_f1 if labeled else None,
            calibration_error=labeled.calibration_error if labeled else None,
            f1=dict(zip(found.labels, labeled.f1, strict=True)) if labeled else {},
            token_f1=w.token_f1 if w else None,
            rouge_1=w.rouge_1 if w else None,
            rouge_2=w.rouge_2 if w else None,
            rouge_l=w.rouge_l if w else None,
        )

    before, after = found.writing or (None, None)

    return Evaluation(
        examples=len(found.tokens),
        tokens=int(found.tokens.sum()),
        base=side(found.base, before),
        adapter=side(found.adapter, after),
        nll_change=found.nll(found.adapter) - found.nll(found.base),
        nll_low=found.interval[0],
        nll_high=found.interval[1],
        groups=int(found.clusters.max()) + 1,
        gained=found.gained,
        lost=found.lost,
        p=found.p,
        written=before.examples if before else 0,
        shown=[
            ShownExample(line=s.line, prompt=s.prompt, expected=s.expected, base=s.base, adapter=s.adapter) for s in found.shown
        ],
    )
