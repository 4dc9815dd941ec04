"""`fedlora roster`: for the coordinators, who say which sites take part. It works on files and needs no connection."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fedlora.cli.output import Json, emit

if TYPE_CHECKING:
    from fedlora.answers import RosterFacts
    from fedlora.formats.keys import PublicIdentity
    from fedlora.formats.roster import Roster
    from fedlora.formats.signed_roster import SignedRoster


roster = typer.Typer(no_args_is_help=True, help="List the sites that take part, and sign the list.")

RosterFile = Annotated[Path, typer.Argument(help="Roster file (JSON).", show_default=False)]


GroupSize = Annotated[
    int | None,
    typer.Option(
        help="Smallest number of sites in a group; default: max-colluding + 2. Under secure aggregation a sum covers whole "
        "groups: a larger group hides each site among more others, but one absent site excludes more of them.",
        show_default=False,
    ),
]
Days = Annotated[
    int | None,
    typer.Option(
        help="Days from now until the next epoch expires; default: it expires when this one would have.", show_default=False
    ),
]
Regroup = Annotated[
    bool,
    typer.Option(
        "--regroup",
        help="Put all active sites into new groups. Use it before the first run under secure aggregation, or for a base model "
        "not used before: sites refuse new groups for a base model on which they have contributed to sums.",
    ),
]


@roster.command("new")
def new(
    file: RosterFile,
    sites: Annotated[list[Path], typer.Argument(help=".pub files of the sites.", show_default=False)],
    server: Annotated[Path, typer.Option(help="The server's .pub file.")],
    coordinator: Annotated[list[Path], typer.Option(help="A coordinator's .pub file; may be repeated.")],
    needed: Annotated[int, typer.Option(help="Number of coordinators who must sign.")] = 1,
    days: Annotated[
        int,
        typer.Option(
            help="Days until the roster expires; renew it in time. A server can hide a revocation from sites for up to this long."
        ),
    ] = 30,
    max_colluding: Annotated[
        int, typer.Option(help="Up to this many sites may collude with the server without learning another site's update.")
    ] = 1,
    min_cohort: Annotated[int, typer.Option(help="Smallest number of sites in a sum.")] = 3,
    min_version: Annotated[str, typer.Option(help="Oldest version of FedLoRA that may take part.")] = "0.1.0",
    group_size: GroupSize = None,
    json: Json = False,
) -> None:
    """Write the first roster, not signed yet.

    A coordinator creates keys with `fedlora keygen site`.

    Example: fedlora roster new roster.json --server server.pub --coordinator carol.pub a.pub b.pub c.pub
    """
    from fedlora.core.errors import StoreError
    from fedlora.formats.epochs import first_epoch
    from fedlora.formats.keys import load_public
    from fedlora.formats.signed_roster import SignedRoster

    if file.exists():
        raise StoreError(f"{file} exists", hint="use `fedlora roster add` or `revoke` to make its next epoch")
    first = first_epoch(
        load_public(server),
        [load_public(s) for s in sites],
        [load_public(c) for c in coordinator],
        needed=needed,
        days=days,
        max_colluding=max_colluding,
        min_cohort=min_cohort,
        min_version=min_version,
        group_size=group_size,
        now=int(time.time()),
    )
    _save(file, SignedRoster(first))
    _to_sign(file, SignedRoster(first), json=json)


@roster.command("add")
def add(
    file: RosterFile,
    sites: Annotated[list[Path] | None, typer.Argument(help=".pub files of the new sites.", show_default=False)] = None,
    days: Days = None,
    regroup: Regroup = False,
    group_size: GroupSize = None,
    json: Json = False,
) -> None:
    """Write the next epoch with more sites, not signed yet.

    With --days alone it only extends the roster. New sites wait until there are enough of them for a group of their own.

    Example: fedlora roster add roster.json north.pub --days 30
    """
    from fedlora.core.errors import ConfigError
    from fedlora.formats.keys import load_public

    if not sites and days is None and not regroup:
        raise ConfigError("nothing to change", hint="name the .pub files of new sites, --days to renew, or --regroup")
    more = [load_public(s) for s in sites or ()]
    _turn(file, add=more, revoke=[], days=days, regroup=regroup, group_size=group_size, json=json)


@roster.command("revoke")
def revoke(
    file: RosterFile,
    names: Annotated[list[str], typer.Argument(help="Names of the sites to revoke.", show_default=False)],
    days: Days = None,
    regroup: Regroup = False,
    group_size: GroupSize = None,
    json: Json = False,
) -> None:
    """Write the next epoch without these sites, not signed yet.

    Neither the name nor the key of a revoked site can be used again. Under secure aggregation the other sites of its group sit
    out until --regroup makes new groups.

    Example: fedlora roster revoke roster.json north
    """
    _turn(file, add=[], revoke=names, days=days, regroup=regroup, group_size=group_size, json=json)


@roster.command("sign")
def sign(
    file: RosterFile,
    key: Annotated[Path, typer.Option(help="The coordinator's .key file.")],
    json: Json = False,
) -> None:
    """Add a coordinator's signature.

    Read the output of `fedlora roster show` first.

    Example: fedlora roster sign roster.json --key carol.key
    """
    from fedlora.core.errors import RosterInvalid
    from fedlora.formats.keys import load_identity
    from fedlora.formats.signed_roster import load_roster

    found, identity = load_roster(file), load_identity(key)
    own, before = found.roster.coordinators, _coordinators_before(file, found.roster)
    if identity.public not in (*own, *before):
        raise RosterInvalid(
            f"{identity.name} is no coordinator of epoch {found.roster.epoch} or of the one before",
            hint=f"sign with the key of {', '.join(sorted({c.name for c in (*own, *before)}))}",
        )
    signed = found.sign(identity)
    signed.verify(own, 0, others=before)  # a damaged signature beside ours would make every site refuse the file
    _save(file, signed)
    _to_sign(file, signed, json=json)


@roster.command("show")
def show(file: RosterFile, json: Json = False) -> None:
    """Print the sites, the validity, the signatures and the digest.

    A site's operator pins the digest in the site file.

    Example: fedlora roster show roster.json
    """
    from fedlora.core.deployment.digests import grouped
    from fedlora.formats.signed_roster import load_roster

    found = load_roster(file)
    facts = _facts(found)
    width = max(len(p["name"]) for p in (*facts["sites"], *facts["coordinators"]))
    lines = [
        f"epoch {facts['epoch']} of federation {facts['fed'][:16]}",
        f"digest       {facts['digest']}",
        f"  (aloud)    {grouped(facts['digest'])}",
        f"valid        {facts['valid_from']} to {facts['valid_until']} ({facts['state']})",
        f"terms        at least {facts['min_cohort']} sites a sum, {facts['max_colluding']} may collude; "
        f"FedLoRA {facts['min_version']} or later",
        f"server       {facts['server']}",
        f"signatures   {facts['signatures']} of {facts['needed']} needed",
        "coordinators",
        *(f"  {p['name']:{width}}  {p['signature']:9}  {p['fingerprint']}" for p in facts["coordinators"]),
        "sites",
        *(f"  {p['name']:{width}}  {p['status']:9}  group {p['group'] or '-':<3}  {p['fingerprint']}" for p in facts["sites"]),
        *_idle(facts),
    ]
    emit(facts, lines, as_json=json)


# --- what they share --------------------------------------------------------------------------------------------


def _turn(
    file: Path,
    *,
    add: list[PublicIdentity],
    revoke: list[str],
    days: int | None,
    regroup: bool,
    group_size: int | None,
    json: bool,
) -> None:
    """Puts the next epoch in the place of this one, which stays beside it."""
    from fedlora.core.errors import StoreError
    from fedlora.formats.epochs import next_epoch
    from fedlora.formats.signed_roster import SignedRoster, load_roster

    old = load_roster(file)
    # No site would ever take an epoch that follows an unsigned one.
    old.verify(old.roster.coordinators, old.roster.needed, others=_coordinators_before(file, old.roster))
    now = int(time.time())
    new = SignedRoster(next_epoch(old.roster, add=add, revoke=revoke, days=days, regroup=regroup, group_size=group_size, now=now))
    kept = _kept(file, old.roster.epoch)
    if kept.exists() and load_roster(kept).roster != old.roster:
        raise StoreError(f"{kept} holds another roster", hint="move it away: the replaced epoch is saved under this name")
    _save(kept, old)
    _save(file, new)
    _to_sign(file, new, json=json)


def _kept(file: Path, epoch: int) -> Path:
    return file.with_name(f"{file.stem}.epoch-{epoch}{file.suffix}")


def _coordinators_before(file: Path, now: Roster) -> tuple[PublicIdentity, ...]:
    """Who may sign the change to this epoch from the one before, as far as that one still lies beside it."""
    from fedlora.formats.signed_roster import load_roster

    kept = _kept(file, now.epoch - 1)
    if now.epoch == 1 or not kept.exists():
        return ()
    before = load_roster(kept).roster
    return before.coordinators if before.digest() == now.previous else ()


def _save(file: Path, signed: SignedRoster) -> None:
    from fedlora.formats.files import write_atomic

    write_atomic(file, signed.dump(), mode=0o644, shared=True)


def _to_sign(file: Path, signed: SignedRoster, *, json: bool) -> None:
    """What every change ends with: the digest, and what is still to be done."""
    from fedlora.core.deployment.digests import grouped

    facts = _facts(signed)
    enough = facts["signatures"] >= facts["needed"]
    missing = ", ".join(c["name"] for c in facts["coordinators"] if c["signature"] != "signed")
    there = "put the file into the server's directory as roster.json; sites get it from there, and need the digest only"
    then = there if enough else f"fedlora roster sign {file} --key KEY, by {missing}"
    lines = [
        f"roster {file}: epoch {facts['epoch']}, {facts['signatures']} of {facts['needed']} signatures",
        f"digest {facts['digest']}",
        f"  to read aloud: {grouped(facts['digest'])}",
        *_idle(facts),
        f"next: {then}",
    ]
    emit(facts, lines, as_json=json)


def _idle(facts: RosterFacts) -> list[str]:
    """Who takes no part under secure aggregation, and why."""
    waiting, out = ", ".join(facts["waiting"]), ", ".join(facts["sitting_out"])
    return [
        *([f"wait for a group, which takes {facts['max_colluding'] + 2} new sites: {waiting}"] if waiting else []),
        *([f"sit out under secure aggregation, as a site of their group was revoked: {out}"] if out else []),
    ]


def _facts(signed: SignedRoster) -> RosterFacts:
    from datetime import UTC, datetime

    from fedlora.answers import Coordinator, RosterFacts, RosterSite
    from fedlora.core.errors import RosterExpired

    r, valid = signed.roster, signed.signers(signed.roster.coordinators)
    group = {name: n for n, names in enumerate(r.groups(), 1) for name in names}
    idle = [m for m in r.sites if m.status == "active" and m.identity.name not in group]
    state: Literal["in force", "not in force yet", "expired"] = "in force"
    try:
        r.check_time(int(time.time()))
    except RosterExpired:
        state = "expired" if time.time() > r.not_after else "not in force yet"
    first, last = (datetime.fromtimestamp(s, UTC).strftime("%Y-%m-%d %H:%M UTC") for s in (r.not_before, r.not_after))

    def signature(name: str) -> Literal["signed", "NOT VALID", "-"]:
        return "signed" if name in valid else "NOT VALID" if name in signed.signatures else "-"

    return RosterFacts(
        epoch=r.epoch,
        digest=r.digest(),
        previous=r.previous,
        fed=r.fed,
        valid_from=first,
        valid_until=last,
        state=state,
        min_version=r.min_version,
        max_colluding=r.max_colluding,
        min_cohort=r.min_cohort,
        needed=r.needed,
        signatures=len(valid),
        server=r.server.fingerprint(),
        coordinators=[Coordinator(name=c.name, signature=signature(c.name), fingerprint=c.fingerprint()) for c in r.coordinators],
        waiting=[m.identity.name for m in idle if not m.group],
        sitting_out=[m.identity.name for m in idle if m.group],
        sites=[
            RosterSite(
                name=m.identity.name,
                status=m.status,
                group=group.get(m.identity.name),
                fingerprint=m.identity.fingerprint(),
            )
            for m in r.sites
        ],
    )
