"""Why a site is not ready: one table of causes, each with a sentence and a remedy, and the log lines that show it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

Part = Literal["keys", "disk", "process", "server", "accepted", "clock", "approved", "base", "data", "gpu", "step"]

PARTS: Final[Mapping[Part, str]] = {
    "keys": "this site's keys and the server's are there, and belong together",
    "disk": "the state directory can be written, and has room",
    "process": "this site's connection process runs and accepts this site's own work",
    "server": "the server answers, and is the one whose certificate is pinned",
    "accepted": "the server lets this site's node key in",
    "clock": "this machine's clock is near the server's, or signed time stamps are corrected",
    "approved": "a person here has approved a plan that this site's policy and roster allow",
    "base": "the base models that the site file names exist, and are those that approved plans pin",
    "data": "the data can be read",
    "gpu": "the GPUs of this machine are used, if it has any",
    "step": "a training step has been done here, with the memory that it takes",
}
"""What makes a site ready, in the order in which it is looked for."""


@dataclass(frozen=True, slots=True)
class Cause:
    """Why a part is missing.

    Attributes:
        part: which one.
        says: one sentence, with facts to fill in.
        cure: what to do about it; empty where the sentence says it.
        retry_s: pause before the next try, seconds; doubled each time, up to a minute.
        lasts: nothing changes until somebody acts, so that a site that has never been connected ends with it.
    """

    part: Part
    says: str
    cure: str
    retry_s: float = 5.0
    lasts: bool = False

    def sentence(self, facts: Mapping[str, str]) -> str:
        return self.says.format_map(_Filled(facts))

    def remedy(self, facts: Mapping[str, str]) -> str:
        return self.cure.format_map(_Filled(facts))

    def explained(self) -> tuple[str, str]:
        """What it means, and what to do, where nobody knows the facts."""
        return self.sentence(_IN_GENERAL), self.remedy(_IN_GENERAL) or "Wait a minute; then look at the part that is named."


class _Filled(dict[str, str]):
    """Facts for a format string; a missing one is printed as a question mark."""

    def __missing__(self, key: str) -> str:
        return "?"


_IN_GENERAL: Final[Mapping[str, str]] = {
    "server": "the server", "host": "HOST", "ca": "ca.crt", "proxy": "of this network", "port": "`local_port`",
    "timeout": "some", "detail": "the message says more", "until": "the day that the message names",
    "begin": "the day that the message names", "today": "another day", "names": "other names", "seconds": "N",
    "way": "ahead or behind", "secret": "the file with it", "log": "the log that the message names",
    "site": "NAME", "words": "the six that `fedlora site join` has printed",
}  # fmt: skip
"""What `fedlora explain` says in the place of a fact."""

_CA = "compare {ca} with the coordinator's ca.crt: `fedlora server init` wrote it beside server.pub"
_AWAY = (
    "compare {server} with the address that the coordinator gave (`server` in the site file); if it is right, ask the "
    "coordinator whether the server is up, and your IT whether a firewall blocks this machine's connections to it"
)

CAUSES: Final[Mapping[str, Cause]] = {
    # --- the way to the server
    "no-name": Cause("server", "the name {host} does not resolve ({detail})", "correct `server` in the site file, or the DNS"),
    "port-closed": Cause("server", "{server} refuses connections: nothing listens there", _AWAY),
    "no-route": Cause(
        "server", "there is no way to {server} ({detail})", "look at this machine's network, and at `server` in the site file"
    ),
    "no-answer": Cause("server", "{server} does not answer within {timeout} s", _AWAY),
    "cut": Cause("server", "the connection to {server} is cut while it is set up ({detail})", _AWAY),
    "proxy-away": Cause(
        "server", "the proxy {proxy} cannot be reached ({detail})", "correct or unset HTTPS_PROXY, or set NO_PROXY"
    ),
    "proxy-refuses": Cause(
        "server", "the proxy {proxy} does not pass connections on to {server} ({detail})", "ask your IT to allow it there"
    ),
    "no-tls": Cause(
        "server",
        "the program that listens on {server} does not use TLS",
        "correct the port in `server` of the site file",
        lasts=True,
    ),
    "wrong-ca": Cause(
        "server", "the certificate of {server} was not issued by the authority in {ca} ({detail})", _CA, lasts=True
    ),
    "expired": Cause(
        "server",
        "the certificate of {server} ended on {until}; this machine's clock says {today}",
        "if the clock is right, the coordinator makes a new one: `fedlora server renew`",
    ),
    "not-yet-valid": Cause(
        "server",
        "the certificate of {server} begins on {begin}; this machine's clock says {today}",
        "set this machine's clock (NTP); if it is right, the server's clock was wrong when the certificate was made",
    ),
    "wrong-host": Cause(
        "server",
        "the certificate of {server} is for {names}",
        "write one of these names into `server` of the site file, or have the coordinator add yours: "
        "`fedlora server renew HOME --host {host}`",
        lasts=True,
    ),
    "bad-certificate": Cause("server", "the certificate of {server} is refused: {detail}", _CA),
    "bad-ca": Cause("server", "{ca} does not hold one certificate", "ask the coordinator for ca.crt again", lasts=True),
    "not-fedlora": Cause(
        "server", "{server} answers {detail}, which no FedLoRA server does", "correct `server` in the site file"
    ),
    "relay-down": Cause(
        "server", "{server} answers, but its relay does not ({detail}): the server is starting, or is overloaded", ""
    ),
    "lost": Cause("server", "no connection to {server} ({detail})", _AWAY),
    # --- whether it lets us in
    "not-enrolled": Cause(
        "accepted",
        "{server} does not know this site's node key",
        "send this site's .pub file to the coordinator, who puts it into `sites/`",
        10.0,
    ),
    "awaits-approval": Cause(
        "accepted",
        "{server} has this site's request to join, and the coordinator has not approved it yet; nothing is wrong here",
        "read these words to the coordinator by telephone, who compares them and runs `fedlora server approve HOME {site}`: "
        "{words}. Then it goes on by itself. If the request was taken back there, ask for a new line",
        10.0,
    ),
    "withdrawn": Cause(
        "accepted",
        "{server} has withdrawn this site's node key: its file was removed there",
        "ask the coordinator for a new line: `fedlora site join` with it makes new keys; a key that was removed never comes back",
        30.0,
    ),
    "in-use": Cause(
        "accepted",
        "another process with this site's node key is connected (another machine, or a killed one: up to 65 s)",
        "stop the other process; every machine needs its own key",
        10.0,
    ),
    "refused": Cause("accepted", "{server} does not admit this site ({detail})", "see {log}", 15.0),
    "bad-node-key": Cause("accepted", "the node key cannot be used ({detail})", "create keys with `fedlora keygen site`", 30.0),
    # --- clocks
    "clock": Cause(
        "clock",
        "this machine's clock is {seconds} s {way} of the server's; only differences up to a day are corrected",
        "set it: `timedatectl set-ntp true`, or ask your IT for an NTP server; if it is right, tell the coordinator",
        30.0,
    ),
    # --- this machine
    "local-port": Cause(
        "process",
        "port {port} on loopback is taken by another program",
        "set `local_port = 0` in the site file (any free one), or stop that program",
    ),
    "wrong-secret": Cause(
        "process",
        "the connection process refuses this site's own password: something has replaced {secret}",
        "it is started again with a new one; if this happens again, find the program that writes there",
        1.0,
    ),
    "no-state": Cause("process", "the connection process cannot be started: {detail}", "check the disk of the state directory"),
    "disk-full": Cause("process", "no space left on this machine's disk", "free some disk space"),
    "ended": Cause("process", "the connection process ended by itself ({detail})", "see {log}", 1.0),
    # --- what is to be trained on
    "no-base": Cause("base", "{detail}", "correct [models] in the site file, or copy the base model there", 30.0),
    "no-data": Cause(
        "data", "{detail}", "correct [data] in the site file; the user that runs this must be able to read it", 30.0
    ),
}
"""By code. Closed; a code may be shown to programs and stays what it is."""

_LINES: Final[Sequence[tuple[re.Pattern[str], str]]] = [
    (re.compile(p, re.IGNORECASE), code)
    for p, code in (
        (r"address already in use", "local-port"),
        (r"failed to load superexec auth secret", "wrong-secret"),
        (r"no space left on device|disk quota exceeded", "disk-full"),
        (r"exit code: 302|private key for authentication|not a valid .*private key", "bad-node-key"),
    )
]
_COLOR = re.compile(r"\x1b\[[0-9;]*m")
_MATTERS = re.compile(r"error|exception|fail|refus|denied|invalid|cannot|unable|no such|exit code", re.IGNORECASE)
_NOISE = re.compile(
    r"^(traceback |\s*$|  |for more information|during handling|the above exception|[=~^-]+$|info\b)", re.IGNORECASE
)


def cause_of(line: str) -> str:
    """The cause that a line of the SuperNode's log shows by itself; empty if none."""
    return next((code for pattern, code in _LINES if pattern.search(line)), "")


def telling(lines: Sequence[str], *, errors_only: bool = False) -> str:
    """Of a process's last lines, the one that says most: the last that speaks of an error, else the last, or none."""
    plain = [_COLOR.sub("", line).rstrip() for line in lines]
    plain = [line for line in plain if not _NOISE.match(line)]
    chosen = next((line for line in reversed(plain) if _MATTERS.search(line)), plain[-1] if plain and not errors_only else "")
    return re.sub(r"^(ERROR|WARNING|CRITICAL)\s*:\s*", "", chosen.strip())[:300]
