"""`fedlora site pause`, `resume`, `leave` and `install-service`."""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedlora.cli.asking import ask
from fedlora.cli.output import Json, emit
from fedlora.cli.standing import SiteArgument

if TYPE_CHECKING:
    from fedlora.site.site_file import SiteFile

_ENDS_S = 60.0


def _site(file: Path) -> tuple[SiteFile, Path, Path]:
    """The site file, its directory and the state directory."""
    from fedlora.site.site_file import load_site_file

    found, root = load_site_file(file), file.resolve().parent
    return found, root, root / found.state


def pause(
    file: SiteArgument = Path("site.toml"),
    until: Annotated[str, typer.Option(help="Time of the day, as 18:00; default: until `site resume`.", show_default=False)] = "",
    json: Json = False,
) -> None:
    """Take no tasks for now; needs no restart.

    A task in progress is finished, then the site leaves the server until the time has come, or `fedlora site resume`. Rounds go
    on without it as far as the plan allows.

    Example: fedlora site pause site.toml --until 18:00
    """
    from fedlora.core.sites.facts import Paused
    from fedlora.site.pause import clock_time, until_of
    from fedlora.site.pause import pause as write

    _, _, state = _site(file)
    at = until_of(until, now=time.time()) if until else 0
    write(state, until=at)
    said = "paused until " + (clock_time(at) if at else "`fedlora site resume`")
    emit(Paused(paused=True, until=at, said=said), [said], as_json=json)


def resume(file: SiteArgument = Path("site.toml"), json: Json = False) -> None:
    """Take tasks again after `site pause`.

    Example: fedlora site resume site.toml
    """
    from fedlora.core.sites.facts import Paused
    from fedlora.site.pause import resume as write

    found, _, state = _site(file)
    said = "takes tasks again" if write(state) else "was not paused"
    if found.policy.hours:
        said += f", within policy.hours = {found.policy.hours}"
    emit(Paused(paused=False, until=0, said=said), [said], as_json=json)


def leave(
    file: SiteArgument = Path("site.toml"),
    erase: Annotated[bool, typer.Option("--erase", help="Also delete this site's keys and its state directory.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    json: Json = False,
) -> None:
    """Leave the federation: `site up` ends, and does not begin again with this state.

    What this site has given stays in the adapters that were made of it. Data and base models are never deleted. --json needs
    --yes.

    Example: fedlora site leave site.toml
    """
    import click

    from fedlora.core.sites.facts import Gone
    from fedlora.site.leaving import doomed as doomed_of
    from fedlora.site.pause import leave as write

    found, root, state = _site(file)
    doomed = doomed_of(found, root) if erase else []
    if not yes and (json or not sys.stdin.isatty()):
        raise click.UsageError("this is not a terminal, so nobody can be asked: run this again with --yes")
    if not yes:
        emit({}, [f"deletes {path}" for path in doomed], as_json=False)
        ask(f"{found.name} leaves?")
    write(state, at=int(time.time()))
    _await_end(state)
    for path in doomed:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    lines = [
        f"{found.name} has left. What it has given stays in the adapters of rounds that are done",
        f"tell the coordinator, who runs `fedlora server revoke HOME {found.name}`, with a roster also `fedlora roster revoke`",
        *(f"deleted: {path}" for path in doomed),
    ]
    emit(Gone(site=found.name, erased=[str(p) for p in doomed]), lines, as_json=json)


def _await_end(state: Path) -> None:
    """Waits until no `site up` works in the state directory."""
    from fedlora.core.errors import ConnectionFailed
    from fedlora.formats.state.lock import holder

    end = time.monotonic() + _ENDS_S
    while (by := holder(state)) is not None:
        if time.monotonic() > end:
            raise ConnectionFailed(
                f"{by} has not ended within {_ENDS_S:.0f} s", hint="it ends with its task; or stop it, and leave again"
            )
        time.sleep(0.2)


_UNIT = """[Unit]
Description=FedLoRA site {name}
After=network-online.target

[Service]
Type=exec
ExecStart={python} -P -m fedlora site up {file}
WorkingDirectory={root}
Restart=on-failure
# What only a person can mend ends with 2, 3 or 5: it would end so again.
RestartPreventExitStatus=2 3 5
RestartSec=15
TimeoutStopSec=40
KillMode=mixed
UMask=0077
NoNewPrivileges=true
LimitCORE=0

[Install]
WantedBy=default.target
"""


def install_service(
    file: SiteArgument = Path("site.toml"),
    show: Annotated[bool, typer.Option("--show", help="Only print the unit.")] = False,
    json: Json = False,
) -> None:
    """Write a systemd unit of this user, so that `site up` survives log-out and reboot. Needs no root.

    Example: fedlora site install-service site.toml
    """
    from fedlora.core.sites.facts import Unit
    from fedlora.formats.files import write_atomic

    found, root, _ = _site(file)
    name = f"fedlora-{found.name}.service"
    home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    path = home / "systemd" / "user" / name
    words = {"python": _quoted(sys.executable), "file": _quoted(str(file.resolve())), "root": _escaped(str(root))}
    text = _UNIT.format(name=found.name, **words)
    if not show:
        write_atomic(path, text.encode(), mode=0o644)
    lines = [
        f"written: {path}",
        f"begin it: systemctl --user daemon-reload && systemctl --user enable --now {name}",
        "so that it runs while nobody is logged in: loginctl enable-linger",
    ]
    emit(Unit(path=str(path), text=text), text.rstrip().split("\n") if show else lines, as_json=json)


def _escaped(text: str) -> str:
    """With systemd's specifiers doubled."""
    return text.replace("%", "%%")


def _quoted(text: str) -> str:
    """A word of a systemd command line."""
    inner = _escaped(text).replace("\\", "\\\\").replace('"', '\\"').replace("$", "$$")
    return f'"{inner}"'
