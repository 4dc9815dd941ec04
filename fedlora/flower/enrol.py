"""Keys and directories of a federation: what `keygen` and `pin` make."""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from fedlora.core.errors import KeyFileError, StoreError
from fedlora.core.messages import SERVER, check_site_name
from fedlora.core.plan import Plan
from fedlora.core.records import Proof
from fedlora.core.toml import dump_toml
from fedlora.formats.epochs import first_epoch
from fedlora.formats.files import save_adapter, write_atomic
from fedlora.formats.keys import Identity, PublicIdentity
from fedlora.formats.plans import FIRST, PROMPT, PROOF, check_begun, load_init, load_plan
from fedlora.formats.records import dump_text
from fedlora.formats.signed_roster import SignedRoster, load_roster
from fedlora.formats.state.audit import note
from fedlora.privacy.claims import with_noise


def make_site_keys(name: str, out: Path, *, identity: Identity | None = None) -> tuple[Path, str]:
    """Makes a site's keys: ``NAME.key``, ``NAME.node.key`` (both mode 0600) and ``NAME.pub``.

    ``NAME.pub`` holds the public identity and, on the second line, the public key of the node key, with which Flower
    authenticates the connection.

    Args:
        identity: the site's keys; None: new ones.

    Returns:
        The public file and its fingerprint.

    Raises:
        KeyFileError: keys of that name exist.
        ConfigError: not a site name.
    """
    from fedlora.gateway.certificates import make_node_key

    check_site_name(name)
    out.mkdir(parents=True, exist_ok=True, mode=0o700)
    identity = identity or Identity.generate(name)
    identity.save(out / f"{name}.key")
    node = make_node_key(out / f"{name}.node.key")
    public = out / f"{name}.pub"
    write_atomic(public, identity.public.file(node.strip()).encode(), mode=0o644)
    return public, identity.public.fingerprint()


def make_server_home(home: Path, *, hosts: Sequence[str]) -> str:
    """Makes a server's directory: ``server.key``, ``server.pub``, ``tls/``, ``sites/``, ``runs/`` and its processes' secret.

    Returns:
        The fingerprint of the server's public key.

    Raises:
        KeyFileError: the directory has a server in it.
    """
    from fedlora.gateway.certificates import make_tls

    if (home / "server.key").exists():
        raise KeyFileError(f"{home} has a server's key already", hint="choose another directory; a key is never overwritten")
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    for part in ("sites", "runs", "flower"):
        (home / part).mkdir(exist_ok=True, mode=0o700)
    make_tls(home / "tls", hosts)
    write_atomic(home / "superexec.secret", secrets.token_hex(32).encode())
    identity = Identity.generate(SERVER)
    write_atomic(home / "server.pub", identity.public.file().encode(), mode=0o644)
    identity.save(home / "server.key")
    note(home, "init", fingerprint=identity.public.fingerprint(), hosts=list(hosts))
    return identity.public.fingerprint()


def renew_certificate(home: Path, hosts: Sequence[str]) -> tuple[list[str], str]:
    """Makes a server's TLS certificate again under its authority.

    Args:
        hosts: names and addresses; none: those of the present one.

    Returns:
        The hosts, and the day until which it is valid, YYYY-MM-DD.

    Raises:
        KeyFileError: the authority is damaged, or there is none.
        ConfigError: not a host name or address.
    """
    from fedlora.gateway.certificates import certificate_end, certificate_hosts, make_tls

    tls = home / "tls"
    if not (tls / "ca.key").exists():
        raise KeyFileError(f"{tls / 'ca.key'} is missing", hint="restore it from a backup: sites trust this authority")
    make_tls(tls, hosts or certificate_hosts(tls / "server.crt"))
    there, until = list(certificate_hosts(tls / "server.crt")), certificate_end(tls / "server.crt").date().isoformat()
    note(home, "renew", hosts=there, until=until)
    return there, until


def make_roster(file: Path, server: PublicIdentity, sites: Sequence[PublicIdentity], coordinator: Identity) -> str:
    """Writes the first roster of a rehearsal, signed and valid for a year; an existing one is kept.

    Returns:
        Its digest, for the sites to pin.
    """
    if not file.exists():
        roster = first_epoch(server, sites, [coordinator.public], now=int(time.time()))
        write_atomic(file, SignedRoster(roster).sign(coordinator).dump(), mode=0o644)
    return load_roster(file).roster.digest()


def pin_plan(plan_file: Path, model: Path, out: Path, *, init: Path | None = None) -> tuple[Plan, Proof]:
    """Proves a base, fills its digest and the first adapter's into a plan, and writes plan, adapter and proof into ``out``,
    complete or not at all.

    Args:
        init: the adapter of an earlier run to begin with, see :func:`fedlora.learn.published.begun.begun_with`; None: a new one,
            or the one beside the plan that ``lora.init`` names.

    Raises:
        StoreError, WrongContext: there is no adapter in ``init`` that this plan can begin with.
        StoreError: ``out`` exists.
        ModelError: nothing usable at ``model``.
        ConfigError: the base does not carry this plan, see :func:`fedlora.learn.proof.check_proven`; or its noise does not
            give the epsilon that it claims, see :func:`fedlora.privacy.claims.with_noise`.
    """
    from fedlora.learn.bases.digest import check_there

    if out.exists():
        raise StoreError(f"{out} exists", hint="choose another --out; a pinned plan is not changed under its run")
    plan = load_plan(plan_file).model_copy(update={"simulation": None})
    check_there(model)
    plan = with_noise(plan)
    from fedlora.data.prompt import prompt_of  # all that loads a base takes seconds
    from fedlora.learn.base import load_base, machine_for
    from fedlora.learn.lora import layout_of
    from fedlora.learn.proof import check_proven, prove
    from fedlora.learn.published.begun import begun_with
    from fedlora.rules.first import first_adapter

    base = load_base(plan.model, model, machine_for(plan, device="cpu"))
    layout = layout_of(base, plan.lora)
    earlier = init is not None or bool(plan.lora.init)
    if init is not None:
        first = begun_with(init, layout, plan=plan, base=base.digest)
    else:
        first = load_init(plan_file, plan) if plan.lora.init else first_adapter(layout, seed=plan.run.seed)
    check_begun(first, layout)
    pinned = plan.pinned(base=base.digest, init=first.digest(), earlier=earlier)
    proof = prove(base, pinned)
    check_proven(proof)
    new = out.with_name(f".{out.name}.{os.getpid()}.new")
    shutil.rmtree(new, ignore_errors=True)
    save_adapter(new / FIRST, first, {"round": 0, "plan": pinned.digest()})
    write_atomic(new / "plan.toml", dump_toml(pinned).encode(), mode=0o644)
    write_atomic(new / PROOF, dump_text(proof), mode=0o644)
    write_atomic(new / PROMPT, dump_text(prompt_of(base.tokenizer, pinned)), mode=0o644)
    os.replace(new, out)
    return pinned, proof
