"""Whether a site may join in a directory, by what lies there."""

from __future__ import annotations

from pathlib import Path

from fedlora.core.errors import ConfigError
from fedlora.formats.invitations import Invitation
from fedlora.site.pause import has_left
from fedlora.site.site_file import SiteFile, load_site_file


def check_place(invitation: Invitation, file: Path, keys: Path) -> None:
    """Nothing of another site is written over, and the secret is not used up for nothing."""
    if file.exists():
        there = load_site_file(file)
        if (there.name, there.server) != (invitation.site, invitation.server):
            raise ConfigError(f"{file} is of {there.name} at {there.server}", hint="join in another directory: --out")
    if keys.exists() and not (keys / f"{invitation.site}.pub").exists():
        raise ConfigError(f"{keys} holds other keys", hint="join in another directory: --out")
    files = ("ca.crt", "server.pub", f"{invitation.site}.key", f"{invitation.site}.node.key")
    if keys.exists() and (lacks := [name for name in files if not (keys / name).is_file()]):
        raise ConfigError(
            f"{keys} holds no {', no '.join(lacks)}: it was not made by `fedlora site join`, or has lost files since",
            hint="join in another directory: --out. Keys of `fedlora keygen site` need no joining: their .pub file is enrolled",
        )


def check_stays(file: Path) -> None:
    """A line that has enrolled keys does not bring back a site that has left with them."""
    found = load_site_file(file)
    if has_left(file.resolve().parent / found.state):
        raise ConfigError(
            f"{found.name} has left (`fedlora site leave` was run here), and the server still has its keys enrolled",
            hint="ask the coordinator to run `fedlora server revoke`, and for a new line: joining with that one makes new keys",
        )


def of_another(invitation: Invitation, file: Path, keys: Path) -> bool:
    """Whether an earlier attempt was with a line for another site or another address."""
    if not (keys / f"{invitation.site}.pub").exists():
        return True
    there = load_site_file(file) if file.exists() else None
    return there is not None and (there.name, there.server) != (invitation.site, invitation.server)


def site_file_of(invitation: Invitation) -> SiteFile:
    """The file of the invited site, as far as the line says it."""
    name = invitation.site
    return SiteFile(name=name, server=invitation.server, key=f"keys/{name}.key", node_key=f"keys/{name}.node.key")
