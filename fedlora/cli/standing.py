"""`fedlora site status` and `fedlora site watch`: how a site stands, by what its `site up` writes down."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedlora.cli.output import Json, emit

if TYPE_CHECKING:
    from fedlora.core.sites.facts import SiteState

SiteArgument = Annotated[Path, typer.Argument(help="Site file (TOML).")]
_LOOK_S = 0.5


def status(file: SiteArgument = Path("site.toml"), json: Json = False) -> None:
    """Say how this site stands: connection, round, own loss, what has left.

    Can be asked while `fedlora site up` runs; if none runs, it says so and shows the last that was known. The exit status is 4 if
    no `site up` runs.

    Example: fedlora site status site.toml
    """
    found = _state(file)
    emit(found, lines(found, now=time.time()), as_json=json)
    if not found["running"]:
        raise typer.Exit(4)


def watch(file: SiteArgument = Path("site.toml"), json: Json = False) -> None:
    """Follow how this site stands: a line for each change, until `fedlora site up` ends.

    Ctrl-C ends the watching, not the site. With --json the last state is the answer.

    Example: fedlora site watch site.toml
    """
    found, before = _state(file), ""
    while found["running"]:
        line = lines(found, now=time.time())[0]
        if line != before and not json:
            emit({}, [line], as_json=False)
        before = line
        time.sleep(_LOOK_S)
        found = _state(file)
    emit(found, lines(found, now=time.time()), as_json=json)
    raise typer.Exit(4)


def _state(file: Path) -> SiteState:
    from fedlora.core.errors import StoreError
    from fedlora.site.progress import load_state
    from fedlora.site.site_file import load_site_file

    where = file.resolve().parent / load_site_file(file).state
    found = load_state(where)
    if found is None:
        raise StoreError(f"no `site up` has run with {where}", hint=f"start it: fedlora site up {file}")
    return found


def lines(found: SiteState, *, now: float) -> list[str]:
    """The state for people: what matters first."""
    from fedlora.core.sites.standing import STANDINGS
    from fedlora.core.words import duration, size

    if not found["running"]:
        ago = duration(max(now - found["updated"], 0))
        head = f"no `site up` runs here; the last one was {found['standing']}, {ago} ago"
    else:
        what = found["why"] or STANDINGS.get(found["standing"], "")  # type: ignore[call-overload]
        head = f"{found['site']} is {found['standing']}: {what}{_round(found)}"
    out = [head]
    if found["cure"] and found["running"]:
        out.append(f"  {found['cure']}")
    if (no := found["refused"]) is not None:
        ago = duration(max(now - no["at"], 0))
        out.append(f"  the last task was not done, {ago} ago: {no['code']}{': ' * bool(no['why'])}{no['why']}")
        out += [f"  {no['cure']}"] * bool(no["cure"])
    count, codes = found["messages"], ", ".join(f"{code} {n}" for code, n in found["codes"].items())
    left = f"{count} message{'s' * (count != 1)} {'have' if count != 1 else 'has'} left, {size(found['sent_bytes'])}"
    out.append(f"  server {found['server']}; {left}{'; error codes: ' * bool(codes)}{codes}")
    if (last := found["last"]) is not None:
        out.append(f"  {last['said']}")
    return out


def _round(found: SiteState) -> str:
    if found["standing"] not in ("training", "uploading") or not found["rounds"]:
        return ""
    loss = "" if found["loss"] is None else f", loss {found['loss']:.3f}"
    return f"; round {found['round']} of {found['rounds']}, step {found['step']} of {found['steps']}{loss}"
