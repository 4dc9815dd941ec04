"""`fedlora site outbox` and `fedlora site dry-run`: what has left, and what would leave."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedlora.cli.output import Json, Quiet, Screen, emit
from fedlora.cli.standing import SiteArgument

if TYPE_CHECKING:
    from fedlora.core.sites.facts import DryRun, Message


def outbox(
    file: SiteArgument = Path("site.toml"),
    verify: Annotated[
        bool, typer.Option("--verify", help="Only say whether the list is whole and as this site wrote it.")
    ] = False,
    json: Json = False,
) -> None:
    """List every message that has left this site: round, time, bytes, SHA-256.

    Each line is signed by this site's key and names the digest of the line before it. If one was changed, dropped or moved, the
    command says which, and the exit status is 3.

    Example: fedlora site outbox site.toml --verify
    """
    from fedlora.core.sites.facts import OutboxRead
    from fedlora.core.words import size
    from fedlora.formats.state.memory import FileMemory
    from fedlora.formats.state.outbox import NAME, read_codes, read_outbox
    from fedlora.site.parts import load_site_key
    from fedlora.site.site_file import load_site_file

    found, root = load_site_file(file), file.resolve().parent
    state = root / found.state
    messages = [m.facts() for m in read_outbox(state / NAME, FileMemory(state / "memory"), load_site_key(found, root).public)]
    total = sum(m["size_bytes"] for m in messages)
    lines = [] if verify else [_line(m) for m in messages]
    closing = f"{len(messages)} messages have left {found.name}, {size(total)}; the list is whole, and signed by this site's key"
    codes = {code: count for code, (count, _) in read_codes(FileMemory(state / "memory")).items()}
    if codes:
        closing += f"; error codes that left instead of one: {', '.join(f'{c} {n}' for c, n in codes.items())}"
    answer = OutboxRead(file=str(state / NAME), messages=messages, size_bytes=total, codes=codes)
    emit(answer, [*lines, closing], as_json=json)


def _line(m: Message) -> str:
    at = datetime.fromtimestamp(m["at"], UTC).strftime("%Y-%m-%d %H:%M:%S")
    where = f"run {m['run'][:12]} round {m['round']:<3}" if m["run"] else f"{'':26}"
    what = f"error code {m['code']}" if m["code"] else f"{m['size_bytes']:>10} bytes  SHA-256 {m['sha256']}"
    return f"  {m['number']:>5}  {at} UTC  {where}  {m['phase']:<10}  {what}"


def dry_run(
    file: SiteArgument = Path("site.toml"),
    plan: Annotated[
        Path | None,
        typer.Option(help="Pinned plan (TOML); default: the one that was approved here last.", show_default=False),
    ] = None,
    save: Annotated[
        Path | None, typer.Option(help="Also write the message to this file, for a person who checks it.", show_default=False)
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show what would leave in the first round of a plan: trained, encrypted, signed, and sent nowhere.

    Every field and tensor is listed with its bytes, and the message is searched for texts of the rows and for names of this
    machine. The server is played by this command, under secure aggregation the other sites too; nothing of this site's state is
    touched, and no approval is used up.

    Example: fedlora site dry-run site.toml --plan plan.toml
    """
    from hashlib import sha256

    from fedlora.core.errors import ConfigError
    from fedlora.core.sites.facts import DryRun, Leaving
    from fedlora.doctor.dry_run import canaries
    from fedlora.doctor.dry_run import dry_run as play
    from fedlora.doctor.plans import known_plans
    from fedlora.formats.files import write_atomic
    from fedlora.formats.plans import load_plan
    from fedlora.site.site_file import load_site_file

    found = load_site_file(file)
    about = load_plan(plan) if plan is not None else next(iter(known_plans(found, file.resolve().parent)), None)
    if about is None:
        raise ConfigError("no plan is approved here, so that nothing would leave", hint="name one by --plan")
    with Screen(quiet=quiet, as_json=json) as screen:
        would = play(file, about, report=screen)
        searched = canaries(would, file)
    if save is not None:
        write_atomic(save, would.message)
    parts, digest = would.parts(), sha256(would.message).hexdigest()
    others = [Leaving(name=step, what="message of its own", size_bytes=len(m)) for step, (m, _) in would.others.items()]
    answer = DryRun(
        site=found.name, plan=about.digest(), size_bytes=len(would.message), sha256=digest, parts=parts, others=others,
        played=would.stage, rows=searched.rows, found=list(searched.found), not_searched=list(searched.not_searched),
        saved=str(save or ""),
    )  # fmt: skip
    emit(answer, _would_leave(answer), as_json=json)
    if searched.found:
        raise typer.Exit(1)


def _would_leave(dry: DryRun) -> list[str]:
    """For people."""
    from fedlora.core.words import size

    lines = [
        f"would leave {dry['site']} in a round of plan {dry['plan'][:12]}: {size(dry['size_bytes'])}, SHA-256 {dry['sha256']}"
    ]
    lines += [f"  {p['size_bytes']:>12} bytes  {p['name']}{'  ' + p['what'] if p['what'] else ''}" for p in dry["parts"]]
    lines += [f"  {p['size_bytes']:>12} bytes  {p['what']}: {p['name']}" for p in dry["others"]]
    leaks = ", ".join(dry["found"])
    looked = f"found in it: {leaks}" if leaks else f"not in it: any of {dry['rows']} texts of rows, paths, host and user name"
    not_searched = [f"  not looked for: {what}" for what in dry["not_searched"]]
    return [*lines, f"  played here: {dry['played']}", f"  {looked}", *not_searched, "nothing was sent"]
