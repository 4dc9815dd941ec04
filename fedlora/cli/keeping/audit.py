"""`fedlora server audit show` and `verify`: what people and runs did at a server, and whether that is still so."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedlora.cli.output import Json, emit

if TYPE_CHECKING:
    from fedlora.formats.state.audit import Line

Home = Annotated[Path, typer.Argument(help="The server's directory, from `fedlora server init`.", show_default=False)]

audit = typer.Typer(no_args_is_help=True, help="The server's log: who did what, and how each run ended.")


@audit.command()
def show(home: Home, json: Json = False) -> None:
    """List what people and runs did at this server.

    Each line has the name of the user who ran the command. The log never leaves this host by itself.

    Example: fedlora server audit show study
    """
    from fedlora.answers.keeping import AuditShown
    from fedlora.formats.state.audit import log_file, read

    lines, wrong = read(home)
    said = [f"WRONG: {what}" for what in wrong]
    if wrong:
        said.append(f"`fedlora server audit verify {home}` says more")
    answer = AuditShown(file=str(log_file(home)), lines=[_facts(line) for line in lines], wrong=wrong)
    emit(answer, [*map(_line, lines), *said], as_json=json)


@audit.command()
def verify(home: Home, json: Json = False) -> None:
    """Check that the log is as this server wrote it, and that keys and runs are as the log has them.

    Every adapter in the directory is read. The exit status is 1 if something is wrong. Who holds the server's key can write
    another log: keep the digest of the last line elsewhere, now and then.

    Example: fedlora server audit verify study
    """
    from fedlora.answers.keeping import AuditVerified
    from fedlora.formats.state.audit import last_digest, log_file
    from fedlora.rounds.audit import verify as check

    lines, found = check(home)
    wrong, last = any(f.wrong for f in found), last_digest(home)
    said = [line for f in found for line in f.lines()]
    if not wrong:
        said.append(f"{len(lines)} lines, whole and signed by this server's key; keys and runs are as they say")
    said.append(f"digest of the last line: {last}")
    answer = AuditVerified(
        file=str(log_file(home)), lines=len(lines), last=last, wrong=wrong, findings=[f.facts() for f in found]
    )
    emit(answer, said, as_json=json)
    if wrong:
        raise typer.Exit(1)


def _facts(line: Line) -> Any:
    from fedlora.answers.keeping import AuditLine

    return AuditLine(number=line.number, at=line.at, what=line.what, by=line.by, facts=line.facts)


def _line(line: Line) -> str:
    at = datetime.fromtimestamp(line.at, UTC).strftime("%Y-%m-%d %H:%M:%S")
    facts = ", ".join(
        f"{name} {_short(name, value)}" for name, value in line.facts.items() if value not in ("", []) and value is not False
    )
    return f"  {line.number:>5}  {at} UTC  {line.by:<10}  {line.what:<9}  {facts}"


def _short(name: str, value: Any) -> str:
    """For people: a digest by its first digits, as the other commands show it."""
    from fedlora.core.canonical import is_digest

    if name in ("until", "made") and isinstance(value, int):
        return datetime.fromtimestamp(value, UTC).strftime("%Y-%m-%d %H:%M UTC")
    if isinstance(value, list):
        return " ".join(map(str, value))
    return str(value)[:12] if is_digest(str(value)) else str(value)
