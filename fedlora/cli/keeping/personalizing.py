"""`fedlora personalize`: a site makes the result of a run its own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedlora.cli.output import Json, Quiet, Screen, emit

if TYPE_CHECKING:
    from fedlora.answers.keeping import Personalized
    from fedlora.learn.personal.at_site import Made


def personalize(
    adapter: Annotated[Path, typer.Argument(help="PEFT directory, from `fedlora site pull`.")],
    site: Annotated[Path, typer.Option(help="Site file: rows, base and state directory of this site.")],
    out: Annotated[Path, typer.Option(help="Directory to create, readable by this user alone.")] = Path("personal"),
    plan: Annotated[
        Path | None, typer.Option(help="The run's plan, where this site has not kept it.", show_default=False)
    ] = None,
    rounds: Annotated[
        int, typer.Option(min=0, max=100_000, help="Further rounds of the plan's steps; 0: as many as the plan has.")
    ] = 0,
    learning_rate: Annotated[float, typer.Option(min=0, max=1, help="Peak learning rate; 0: the plan's.")] = 0.0,
    alone: Annotated[
        bool, typer.Option("--alone/--no-alone", help="Also train from the beginning, as without a federation.")
    ] = True,
    prefer: Annotated[
        str,
        typer.Option(help="own: as good as can be here; all: on the others' rows too, and here no worse than alone."),
    ] = "own",
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Make the adapter of a run this site's own, by more training on its rows, if its held-out rows say that this helps.

    Tried are the global adapter, what comes of further steps here, what this site learns alone, and what lies between. The
    choice is the one nearest to the global adapter that held-out rows cannot tell from the best; who prefers all gets the nearest
    that is no worse than what this site learns alone. A power cut loses nothing: the same command goes on.

    The result remembers this site's rows, and nothing protects them in it: keep it where the rows are. Nothing is sent.

    Example: fedlora personalize adapter --site site.toml
    """
    import click

    from fedlora.formats.files import refuse_existing
    from fedlora.formats.published.directory import made_for

    if prefer not in ("own", "all") or (prefer == "all" and not alone):
        raise click.UsageError("--prefer is own, or all, which compares with --alone")
    refuse_existing(out)
    made_for(adapter)
    from fedlora.learn.personal.at_site import personalize as make  # which takes seconds to load

    with Screen(quiet=quiet, as_json=json) as screen:
        made = make(
            adapter,
            site,
            out,
            plan_file=plan,
            rounds=rounds,
            learning_rate=learning_rate,
            alone=alone,
            prefer="all" if prefer == "all" else "own",
            report=screen,
        )
    emit(_answer(out, made), [*_lines(made), *_next(out, adapter, made)], as_json=json)


def _answer(out: Path, made: Made) -> Personalized:
    from fedlora.answers.keeping import Personalized

    choice = made.choice
    return Personalized(
        out=str(out),
        way=choice.chosen.way,
        share=choice.chosen.share,
        examples=choice.examples,
        tried=[one.model_dump(mode="json") for one in choice.tried],
        apart=made.apart,
        before=made.before,
        after=made.after,
        tokens=made.tokens,
        steps=made.steps,
    )


def _lines(made: Made) -> list[str]:
    choice = made.choice
    found = [f"tried on {choice.examples} held-out examples, nats a token (less is better):"]
    for one in choice.tried:
        mark = "<- chosen" if one == choice.chosen else ""
        found.append(f"  {one.nats:8.3f}  {one.words()}  {mark}".rstrip())
    if made.before is not None and made.after is not None:
        found.append(f"on {made.apart} held-out examples that did not choose: {made.before:.3f} global, {made.after:.3f} chosen")
    else:
        found.append("too few held-out examples to keep half of them apart: what the choice is worth on new rows is not known")
    return found


def _next(out: Path, adapter: Path, made: Made) -> list[str]:
    if made.choice.chosen.way == "global":
        return [
            f"written: {out}, which is the global adapter: no row speaks for another. Use {adapter}, which holds nothing more"
        ]
    return [
        f"written: {out}. It remembers rows of this site without any protection: keep it here, and like them",
        f"try it: fedlora try {out} --base BASE --prompt '...'",
    ]
