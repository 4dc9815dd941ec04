"""What the commands answer with which sites join and leave a federation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal

from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict

from fedlora.core.deployment.status import SiteStanding

_exact = with_config(ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False))


@_exact
class Joined(TypedDict):
    site: str
    server: str
    """host:port"""
    file: str
    """path of the site file"""
    state: str
    """``waiting`` for the coordinator, or ``enrolled``"""
    words: list[str]
    """to be compared over the telephone"""
    fingerprint: str
    """of this site's keys"""
    server_fingerprint: str


@_exact
class Invited(TypedDict):
    site: str
    invitation: str
    """the line to send; secret until it is used"""
    until: int
    """seconds since 1970"""
    file: str | None
    """where the line was written; null: nowhere"""


@_exact
class Invitations(TypedDict):
    invitations: list[Invited]


@_exact
class Asking(TypedDict):
    """A site that was invited and is not enrolled yet."""

    site: str
    state: Literal["invited", "expired", "asks"]
    """asks: its keys wait for approval"""
    until: int
    """end of its invitation, seconds since 1970; 0 for a site that asks"""
    fingerprint: str
    """of its keys; empty: none came"""
    words: list[str]
    """that its operator sees too; empty: no keys came"""


@_exact
class Requests(TypedDict):
    sites: list[Asking]


@_exact
class Enrolled(TypedDict):
    site: str
    fingerprint: str
    file: str
    """path of its public file"""


@_exact
class Revoked(TypedDict):
    site: str
    was: list[str]
    """what there was of it: ``enrollment``, ``request``, ``invitation``"""


@_exact
class Sites(TypedDict):
    sites: list[SiteStanding]
    asking: list[Asking]


@_exact
class Renewed(TypedDict):
    hosts: list[str]
    """for which the certificate is valid"""
    until: str
    """YYYY-MM-DD"""


ANSWERS: Final[Mapping[str, type[Any]]] = {
    "site join": Joined,
    "server invite": Invitations,
    "server requests": Requests,
    "server approve": Enrolled,
    "server revoke": Revoked,
    "server sites": Sites,
    "server renew": Renewed,
}
