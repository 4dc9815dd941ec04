"""`fedlora roster`: for the coordinators, who say which sites take part. It works on files and needs no connection."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fedlora.cli.output import Json, emit

if TYPE_CHECKING:
    from fedlora.core.answers import RosterFacts
    from fedlora.formats.keys import PublicIdentity
    from fedlora.formats.roster import Roster
    from fedlora.formats.signed_roster import SignedRoster


roster = typer.Typer(no_args_is_help=True, help="For the coordinators: say who takes part, and sign it.")

RosterFile = Annotated[Path, typer.Argument(help="Roster file (JSON).", show_default=False)]


GroupSize = Annotated[
    int | None,
    typer.Option(
        help="Fewest sites of a group; default: two more than may collude. Under secure aggregation a sum is over whole groups: "
        "larger groups hide a site among more, and one site that is away takes more others with it.",
        show_default=False,
    ),
]
Regroup = Annotated[
    bool,
    typer.Option(
        "--regroup",
        help="Put all active sites into new groups. Before the first run under secure aggregation, or for a base model that was "
        "not used yet: sites refuse new groups on a base model for which they have given to sums.",
    ),
]


@roster.command("new")
def new(
    file: RosterFile,
    sites: Annotated[list[Path], typer.Argument(help="The sites' .pub files.", show_default=False)],
    server: Annotated[Path, typer.Option(help="The server's .pub file.")],
    coordinator: Annotated[list[Path], typer.Option(help="A coordinator's .pub file; may be repeated.")],
    needed: Annotated[int, typer.Option(help="How many coordinators have to sign.")] = 1,
    days: Annotated[
        int, typer.Option(help="How long the roster holds: so long a server can keep a revocation from sites. Renew in time.")
    ] = 30,
    max_colluding: Annotated[int, typer.Option(help="So many sites in league learn nothing of the others.")] = 1,
    min_cohort: Annotated[int, typer.Option(help="Fewest sites whose sum may be shown.")] = 3,
    min_version: Annotated[str, typer.Option(help="Oldest release that may take part.")] = "0.1.0",
    group_size: GroupSize = None,
    json: Json = False,
) -> None:
    """Write the first roster, not signed yet. A coordinator's keys come from `fedlora keygen site`.

    Example: fedlora roster new roster.json --server server.pub --coordinator carol.pub a.pub b.pub c.pub
    """
    from fedlora.core.errors import StoreError
    from fedlora.formats.epochs import first_epoch
    from fedlora.formats.keys import load_public
    from fedlora.formats.signed_roster import SignedRoster

    if file.exists():
        raise StoreError(f"{file} exists", hint="`fedlora roster add` and `revoke` make its next epoch")
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
    sites: Annotated[list[Path] | None, typer.Argument(help="The new sites' .pub files.", show_default=False)] = None,
    days: Annotated[int | None, typer.Option(help="Hold from now for so long; default: the end stays.")] = None,
    regroup: Regroup = False,
    group_size: GroupSize = None,
    json: Json = False,
) -> None:
    """Write the next epoch with more sites, not signed yet. With --days alone it only renews.

    New sites get groups of their own, as soon as they are enough for one; until then they wait.

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
    names: Annotated[list[str], typer.Argument(help="Names of sites.", show_default=False)],
    days: Annotated[int | None, typer.Option(help="Hold from now for so long; default: the end stays.")] = None,
    regroup: Regroup = False,
    group_size: GroupSize = None,
    json: Json = False,
) -> None:
    """Write the next epoch without these sites, not signed yet. Neither name nor key can come back.

    The other sites of their groups sit out, under secure aggregation, until --regroup or new sites make other groups.

    Example: fedlora roster revoke roster.json north
    """
    _turn(file, add=[], revoke=names, days=days, regroup=regroup, group_size=group_size, json=json)


@roster.command("sign")
def sign(
    file: RosterFile,
    key: Annotated[Path, typer.Option(help="A coordinator's .key file.")],
    json: Json = False,
) -> None:
    """Add a coordinator's signature. Read `fedlora roster show` before.

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
            hint=f"the coordinators are {', '.join(sorted({c.name for c in (*own, *before)}))}; a key is known by its bytes",
        )
    signed = found.sign(identity)
    signed.verify(own, 0, others=before)  # a damaged signature beside ours would make every site refuse the file
    _save(file, signed)
    _to_sign(file, signed, json=json)


@roster.command("show")
def show(file: RosterFile, json: Json = False) -> None:
    """Print who takes part, until when, who has signed, and the digest that a site's operator pins.

    Example: fedlora roster show roster.json
    """
    from fedlora.formats.signed_roster import load_roster

    found = load_roster(file)
    facts = _facts(found)
    width = max(len(p["name"]) for p in (*facts["sites"], *facts["coordinators"]))
    lines = [
        f"epoch {facts['epoch']} of federation {facts['fed'][:16]}",
        f"digest       {facts['digest']}",
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
    emit(facts, "\n".join(lines), as_json=json)


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
        raise StoreError(f"{kept} is another roster", hint="move it away: the epoch that is replaced is kept under this name")
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

    write_atomic(file, signed.dump(), mode=0o644)


def _to_sign(file: Path, signed: SignedRoster, *, json: bool) -> None:
    """What every change ends with: the digest, and what is still to be done."""
    facts = _facts(signed)
    enough = facts["signatures"] >= facts["needed"]
    missing = ", ".join(c["name"] for c in facts["coordinators"] if c["signature"] != "signed")
    then = "give the file to the server and to every site" if enough else f"fedlora roster sign {file} --key KEY, by {missing}"
    lines = [
        f"{file}: epoch {facts['epoch']}, {facts['signatures']} of {facts['needed']} signatures",
        f"digest {facts['digest']}",
        *_idle(facts),
        f"next: {then}",
    ]
    emit(facts, "\n".join(lines), as_json=json)


def _idle(facts: RosterFacts) -> list[str]:
    """Who takes no part under secure aggregation, and why."""
    waiting, out = ", ".join(facts["waiting"]), ", ".join(facts["sitting_out"])
    return [
        *([f"wait for a group, which takes {facts['max_colluding'] + 2} new sites: {waiting}"] if waiting else []),
        *([f"sit out under secure aggregation, as a site of their group was revoked: {out}"] if out else []),
    ]


def _facts(signed: SignedRoster) -> RosterFacts:
    from datetime import UTC, datetime

    from fedlora.core.answers import Coordinator, RosterFacts, RosterSite
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
