"""How sites join and leave a federation: `fedlora site join`, `fedlora server init`, `invite`, `approve` and their neighbors."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedlora.cli.asking import ask
from fedlora.cli.output import Json, Quiet, Screen, emit

if TYPE_CHECKING:
    from fedlora.answers import enrollment as answers
    from fedlora.gateway.entry.asking import Asking
    from fedlora.gateway.invitations import Invitations

Home = Annotated[Path, typer.Argument(help="The server's directory, from `fedlora server init`.")]
Site = Annotated[str, typer.Argument(help="Name of the site.", show_default=False)]


def hook(server: typer.Typer, site: typer.Typer) -> None:
    """Adds these commands to `fedlora server` and `fedlora site`."""
    site.command("join")(join)
    for command in (init, invite, requests, approve, sites, revoke, renew):
        server.command(command.__name__)(command)


# --- a site -----------------------------------------------------------------------------------------------------


def join(
    invitation: Annotated[
        str,
        typer.Argument(
            help="The line from the coordinator: fl1:NAME....@HOST:PORT.", envvar="FEDLORA_INVITATION", show_default=False
        ),
    ] = "",
    from_file: Annotated[
        Path | None,
        typer.Option(help="A file with that line in it, such as the saved e-mail; -: standard input.", show_default=False),
    ] = None,
    out: Annotated[Path, typer.Option(help="Directory for site.toml and keys/.")] = Path(),
    wait: Annotated[
        float, typer.Option(help="Longest wait for the server, and for the coordinator's approval, seconds.", min=0)
    ] = 600.0,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Join a federation with the line that its coordinator sent.

    The server is compared with the line before anything is sent. Keys are made here. The same command goes on where it was.

    Example: fedlora site join 'fl1:st-marys.PIN.SECRET@fed.example.org:8443'
    """
    import click

    from fedlora.core.errors import ConfigError
    from fedlora.flower.join import join as library
    from fedlora.formats.invitations import Invitation

    if bool(invitation) == (from_file is not None):
        raise click.UsageError("name the invitation, or --from-file with it, and not both")
    try:
        text = invitation or (sys.stdin.read(1 << 20) if str(from_file) == "-" else Path(str(from_file)).read_text())
    except (OSError, UnicodeDecodeError):
        raise ConfigError(f"cannot read {from_file}", hint="save the e-mail as plain text") from None
    line, there = Invitation.parse(text), out.exists()
    out.mkdir(parents=True, exist_ok=True)
    try:
        with Screen(quiet=quiet, as_json=json) as screen:
            done = library(line, out, wait_s=wait, report=screen)
    finally:
        if not there:
            with suppress(OSError):  # a failed attempt leaves nothing; what a successful one has made keeps it
                out.rmdir()
    file = done["file"]
    if done["state"] == "waiting":
        lines = [
            "the coordinator has not approved it yet; the request stays there, and this command may be repeated",
            f"words: {' '.join(done['words'])}",
        ]
    else:
        lines = [f"{done['site']} is enrolled at {done['server']}"]
    lines += [
        f"fingerprint of the server: {done['server_fingerprint']}",
        f"next: set path under [data], and [models], in {file}",
        f"the coordinator's plan: `fedlora site approve plan.toml --site {file}`",
        f"then: `fedlora site doctor {file}`, `fedlora site up {file}`",
    ]
    emit(done, lines, as_json=json)


# --- a coordinator ----------------------------------------------------------------------------------------------


def init(
    home: Annotated[Path, typer.Argument(help="Directory of the server; created if it does not exist.")],
    host: Annotated[list[str], typer.Option(help="Host name or IP address that sites connect to; may be repeated.")],
    json: Json = False,
) -> None:
    """Create a server's directory.

    It holds the signing key, a certificate authority, the TLS certificate and secrets.

    Example: fedlora server init study --host fed.example.org
    """
    from fedlora.answers import ServerKeys
    from fedlora.flower.enrol import make_server_home

    fingerprint = make_server_home(home, hosts=host)
    lines = [
        f"fingerprint, to compare over the telephone: {fingerprint}",
        f"next: `fedlora server up {home}`, and a line for each site: `fedlora server invite {home} NAME`",
        f"without invitations: send {home / 'server.pub'} and {home / 'tls' / 'ca.crt'} to every site, "
        f"and put each site's .pub file into {home / 'sites'}",
    ]
    emit(ServerKeys(home=str(home), fingerprint=fingerprint), lines, as_json=json)


def invite(
    home: Home,
    names: Annotated[list[str], typer.Argument(help="Names of the sites: a-z, 0-9 and -.", show_default=False)],
    address: Annotated[
        str,
        typer.Option(
            help="host:port that sites connect to; default: the certificate's first host, and the port of `server up` or 8443.",
            show_default=False,
        ),
    ] = "",
    hours: Annotated[float, typer.Option(help="How long each line holds.", min=0.01, max=8760)] = 72.0,
    out: Annotated[
        Path | None, typer.Option(help="Also write each line to NAME.join in this directory, mode 0600.", show_default=False)
    ] = None,
    json: Json = False,
) -> None:
    """Make a line for each site, with which it joins once.

    Send each line to its site alone. An earlier line for the same name is void.

    Example: fedlora server invite study st-marys guys
    """
    from fedlora.answers.enrollment import Invited
    from fedlora.formats.files import named_disk_errors, write_atomic

    book, at = _book(home), address or _address(home)
    book.check(names, address=at)  # all before the first: an error at the next one would take with it what was made
    if out is not None:
        with named_disk_errors(out):
            out.mkdir(parents=True, exist_ok=True)
    made = []
    for name in names:
        found = book.invite(name, address=at, hours=hours)
        file = out / f"{name}.join" if out is not None else None
        if file is not None:
            write_atomic(file, f"{found.line()}\n".encode())
        until = int(time.time() + 3600 * hours)
        made.append(Invited(site=name, invitation=found.line(), until=until, file=str(file) if file else None))
    lines = _elsewhere(home, address) if address else [] if _port(home) else [_by_default(at)]
    lines.append(f"send each site its line; each works once, until {_when(made[0]['until'])}:")
    lines += [f"fedlora site join '{one['invitation']}'" for one in made]
    lines.append(f"then, while `fedlora server up` runs: `fedlora server requests {home}`")
    emit({"invitations": made}, lines, as_json=json)


def requests(home: Home, json: Json = False) -> None:
    """List the sites that were invited, with the words of those that ask to join.

    Example: fedlora server requests study
    """
    found = _book(home).asking()
    lines = [line for one in found for line in _asking_lines(home, one)] or ["nobody is invited"]
    emit({"sites": [_facts(one) for one in found]}, lines, as_json=json)


def approve(
    home: Home,
    name: Site,
    words: Annotated[str, typer.Option(help="The six words, as the site has read them to you.", show_default=False)] = "",
    yes: Annotated[bool, typer.Option("--yes", help="Approve without asking: somebody here has compared the words.")] = False,
    json: Json = False,
) -> None:
    """Enroll a site that asks to join, once its words are what its operator reads to you.

    With --json, give --words or --yes.

    Example: fedlora server approve study st-marys --words "abandon ability able about above absent"
    """
    import click

    from fedlora.answers.enrollment import Enrolled
    from fedlora.core.errors import ConfigError

    book = _book(home)
    found = {one.site: one for one in book.asking()}.get(name)
    if found is None or found.state != "asks":
        raise ConfigError(f"{name} does not ask to join", hint=f"`fedlora server requests {home}` lists who does")
    if words and words.lower().split() != list(found.words):
        raise ConfigError(
            f"these are not the words of {name}'s keys: nothing was enrolled",
            hint=f"listen again; if they differ, somebody else has used the invitation: `fedlora server revoke {home} {name}`",
        )
    if not words and not yes:
        if json or not sys.stdin.isatty():
            raise click.UsageError("nobody can be asked here: give the site's --words, or --yes once they were compared")
        emit({}, _asking_lines(home, found), as_json=False)
        ask("\ndoes the site read these six words?")
    book.approve(name, found.digest)
    file = home / "sites" / f"{name}.pub"
    lines = [f"{name} is enrolled", *_runs_lines(home), *_roster_lines(home, f"fedlora roster add {home / 'roster.json'} {file}")]
    emit(Enrolled(site=name, fingerprint=found.fingerprint, file=str(file)), lines, as_json=json)


def sites(home: Home, json: Json = False) -> None:
    """List the sites, and what each lacks to be ready.

    Example: fedlora server sites study
    """
    from fedlora.answers.enrollment import Sites
    from fedlora.cli.coordinator import site_lines
    from fedlora.flower.coordinator.look import look

    found, asking = look(home)["sites"], _book(home).asking()
    lines = site_lines(found) + [line for one in asking for line in _asking_lines(home, one)]
    emit(Sites(sites=found, asking=[_facts(one) for one in asking]), lines, as_json=json)


def revoke(home: Home, name: Site, json: Json = False) -> None:
    """Take back a site's enrollment, its request or its invitation.

    A site that was enrolled comes back with new keys only.

    Example: fedlora server revoke study st-marys
    """
    from fedlora.answers.enrollment import Revoked

    was = _book(home).revoke(name)
    lines = [f"{name}: {', '.join(was)} taken back"]
    if "enrollment" in was:
        lines += _roster_lines(home, f"fedlora roster revoke {home / 'roster.json'} {name}")
    emit(Revoked(site=name, was=was), lines, as_json=json)


def renew(
    home: Home,
    host: Annotated[
        list[str] | None,
        typer.Option(help="Host name or IP address; may be repeated; default: those it has.", show_default=False),
    ] = None,
    json: Json = False,
) -> None:
    """Make the server's TLS certificate again: it has expired, or the host has another name.

    The authority stays, so that nothing changes at the sites. Restart `fedlora server up` afterwards.

    Example: fedlora server renew study --host fed.example.org
    """
    from fedlora.answers.enrollment import Renewed
    from fedlora.flower.enrol import renew_certificate

    hosts, until = renew_certificate(home, host or [])
    emit(Renewed(hosts=hosts, until=until), [f"valid until {until} for {', '.join(hosts)}; restart `server up`"], as_json=json)


# --- what they share --------------------------------------------------------------------------------------------


def _book(home: Path) -> Invitations:
    from fedlora.gateway.invitations import Invitations

    found = Invitations(home, time.time)
    found.pin()  # says so if this is no server's directory
    return found


def _address(home: Path) -> str:
    from fedlora.gateway.certificates import certificate_hosts

    hosts = certificate_hosts(home / "tls" / "server.crt")
    host = next((host for host in hosts if host not in ("localhost", "127.0.0.1")), "127.0.0.1")
    port = _port(home) or 8443
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _port(home: Path) -> int:
    """On which `server up` listens now; 0: none runs."""
    from fedlora.core.errors import FedLoRAError
    from fedlora.flower.jobs import load_address
    from fedlora.formats.state.lock import holder
    from fedlora.gateway.addresses import split_address

    try:
        return split_address(load_address(home).listen)[1] if holder(home / "flower") is not None else 0
    except FedLoRAError:
        return 0


def _by_default(at: str) -> str:
    return (
        f"no `fedlora server up` is ready here yet, so sites will connect to {at}, which is a guess: --address HOST:PORT names "
        "another one, or give this command again once it listens"
    )


def _elsewhere(home: Path, address: str) -> list[str]:
    """A warning if sites would knock at another port than the one that is open."""
    from fedlora.gateway.addresses import split_address

    port = _port(home)
    if port in (0, split_address(address)[1]):
        return []
    return [
        f"CHECK THE ADDRESS: `server up` listens on port {port} and the lines name {address}; right only if something in between "
        "passes that port on"
    ]


def _when(at: int) -> str:
    from datetime import UTC, datetime

    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _facts(one: Asking) -> answers.Asking:
    from fedlora.answers.enrollment import Asking

    return Asking(site=one.site, state=one.state, until=one.until, fingerprint=one.fingerprint, words=list(one.words))


def _asking_lines(home: Path, one: Asking) -> list[str]:
    if one.state == "asks":
        return [
            f"{one.site} asks to join; words: {' '.join(one.words)}",
            f"  fingerprint {one.fingerprint}; `fedlora server approve {home} {one.site}`",
        ]
    if one.state == "invited":
        return [f"{one.site} is invited until {_when(one.until)} and has not joined yet"]
    return [f"{one.site}: the invitation has expired; `fedlora server invite {home} {one.site}` makes another one"]


def _runs_lines(home: Path) -> list[str]:
    """That a run that goes on does not ask who is enrolled now."""
    from fedlora.flower.coordinator.runs import live

    job = next(iter(live(home).values()), None)
    if job is None or not _port(home):
        return []
    return [
        f"run {job.name} has begun without it, and does not ask it until it is started again: `fedlora server stop {home} "
        f"{job.name} --after-round`, then `fedlora server start ... --resume`"
    ]


def _roster_lines(home: Path, command: str) -> list[str]:
    return [f"under secure aggregation the roster decides: `{command}`, then sign"] if (home / "roster.json").exists() else []
