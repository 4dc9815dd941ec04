"""A server's invitations: who may ask to join, who has asked, and what the door answers. FORMAT.md, section 13.

``HOME/invitations/NAME.json`` holds the digest of an invitation's secret, its end, and, once it was used, the digest of the
public file that came with it. That file lies in ``HOME/requests/NAME.pub`` until a person puts it among the enrolled sites.
The record stays until the site is revoked or invited anew, so that only who has the secret is told how a request stands.
"""

from __future__ import annotations

import base64
import fcntl
import hashlib
import hmac
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from fedlora.core.canonical import canonical, parse_object
from fedlora.core.errors import BadSignature, ConfigError, FedLoRAError, KeyFileError
from fedlora.core.limits import MAX_SITES
from fedlora.core.messages import check_site_name
from fedlora.formats.files import load_record, read_file, save_record, write_atomic
from fedlora.formats.invitations import Invitation, pin_of, secret_digest, words_of
from fedlora.formats.keys import Identity, PublicIdentity
from fedlora.formats.state.audit import note, removed_keys
from fedlora.gateway.addresses import split_address
from fedlora.gateway.certificates import certificate_hosts, node_key_pem
from fedlora.gateway.entry.asking import Asking

JOIN: Final = "/v1/join"
_KIND: Final = "invitation"
_HINT: Final = "invite the site again"
_MOST_UNFIT: Final = 5  # files of keys that do not fit, before a line counts as used

log = logging.getLogger(__name__)


class Refusal(Exception):
    """A request to join that is refused; ``why`` goes to the caller."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why


@dataclass(slots=True)
class Invitations:
    """The invitations in a server's directory.

    Args:
        home: the server's directory.
        clock: seconds since 1970.
    """

    home: Path
    clock: Callable[[], float]
    _read: dict[Path, tuple[tuple[int, int], _Keys]] = field(default_factory=dict)

    # --- the coordinator ------------------------------------------------------------------------------------------

    def invite(self, site: str, *, address: str, hours: float) -> Invitation:
        """Makes an invitation; an earlier one of this name, used or not, is void.

        Args:
            address: host:port that the site connects to.

        Raises:
            ConfigError: no site's name, it is enrolled already, too many sites, or the certificate is for other hosts.
            KeyFileError: the server's own files are missing.
        """
        self.check([site], address=address)
        for part in ("invitations", "requests"):
            (self.home / part).mkdir(exist_ok=True, mode=0o700)
        made = Invitation.new(site, self.pin(), address)
        until = int(self.clock() + 3600 * hours)
        with self._alone():
            self._asked(site).unlink(missing_ok=True)
            save_record(
                self._file(site),
                _KIND,
                {"site": site, "secret": secret_digest(made.secret), "until": until, "key": "", "unfit": 0},
            )
        note(self.home, "invite", site=site, until=until)
        return made

    def check(self, sites: Sequence[str], *, address: str) -> None:
        """Raises whatever :meth:`invite` would for any of them, and writes nothing: a line that was made is shown once only.

        Raises:
            ConfigError, KeyFileError: see :meth:`invite`; or a site is named twice, whose first line would be void at once.
        """
        for site in sites:
            check_site_name(site)
        if twice := sorted({site for site in sites if sites.count(site) > 1}):
            raise ConfigError(f"{', '.join(twice)} is named twice", hint="each site gets one line; leave out the repetition")
        hosts = certificate_hosts(self.home / "tls" / "server.crt")
        if split_address(address)[0] not in hosts:
            raise ConfigError(
                f"the server's certificate is not for {split_address(address)[0]}; it is for {', '.join(hosts)}",
                hint="name one of these, or make the certificate again",
            )
        for site in sites:
            if self._enrolled(site).exists():
                hint = f"`fedlora server revoke {self.home} {site}` first, if it has new keys"
                raise ConfigError(f"{site} is enrolled", hint=hint)
        known = {p.stem for part in ("invitations", "sites") for p in (self.home / part).glob("*.*")}
        if len(known.union(sites)) > MAX_SITES:
            raise ConfigError(f"a federation has {MAX_SITES} sites at most")
        self.pin()

    def asking(self) -> list[Asking]:
        """All sites that were invited and are not enrolled yet, by name; a file that is damaged counts as expired."""
        found = []
        for path in sorted((self.home / "invitations").glob("*.json")):
            site = path.stem
            if self._enrolled(site).exists():
                continue
            try:
                until = int((load_record(path, _KIND) or {"until": 0})["until"])
                blob = read_file(self._asked(site))
                public = PublicIdentity.parse(blob.decode("ascii")) if blob is not None else None
            except (FedLoRAError, UnicodeDecodeError):
                until, blob, public = 0, None, None
            if blob is not None and public is not None:
                digest = hashlib.sha256(blob).hexdigest()
                found.append(Asking(site, "asks", 0, public.fingerprint(), words_of(self.pin(), blob), digest))
            else:
                found.append(Asking(site, "invited" if until > self.clock() else "expired", until, "", (), ""))
        return found

    def approve(self, site: str, digest: str) -> None:
        """Enrolls a site that has asked, with the very file whose words were compared.

        Args:
            digest: of that file, from :meth:`asking`.

        Raises:
            ConfigError: it has not asked, or another file came since.
            KeyFileError, BadSignature: its file is damaged, shares a key with another site's, or holds keys that were removed.
        """
        with self._alone():
            blob = read_file(self._asked(site))
            if blob is None:
                raise ConfigError(f"{site} has not asked to join", hint=f"`fedlora server requests {self.home}` lists who has")
            if hashlib.sha256(blob).hexdigest() != digest:
                raise ConfigError(
                    f"other keys came for {site} in the meantime: nothing was enrolled", hint="compare the words anew"
                )
            _check_keys(site, blob, self._enrolled_keys())
            if self._removed(blob):
                raise KeyFileError(
                    f"{site} asks with keys that were enrolled here and taken back: the relay never lets them in again",
                    hint=f"`fedlora server revoke {self.home} {site}`, then invite it anew: that line makes new keys",
                )
            write_atomic(self._enrolled(site), blob, mode=0o644)
            self._asked(site).unlink(missing_ok=True)
        note(self.home, "approve", site=site, fingerprint=PublicIdentity.parse(blob.decode("ascii")).fingerprint())

    def revoke(self, site: str) -> list[str]:
        """Takes away a site's enrollment, or its request and its invitation.

        Returns:
            Which of them there were.

        Raises:
            ConfigError: none of them.
        """
        parts = {"enrollment": self._enrolled(site), "request": self._asked(site), "invitation": self._file(site)}
        with self._alone():
            found = [name for name, path in parts.items() if path.exists()]
            for path in parts.values():
                path.unlink(missing_ok=True)
        if not found:
            raise ConfigError(
                f"{site} is neither enrolled nor invited", hint=f"`fedlora server sites {self.home}` lists the sites"
            )
        note(self.home, "revoke", site=site, was=found)
        return found[:1] if found[0] == "enrollment" else found

    # --- the door -------------------------------------------------------------------------------------------------

    def pin(self) -> str:
        """Of this server."""
        return pin_of(*self._public())

    def offer(self) -> bytes:
        """What anybody may read: the authority and the server's public key, to be compared with an invitation's pin."""
        authority, server = self._public()
        return canonical({"ca": authority.decode(), "server": server.decode()})

    def ask(self, body: bytes) -> str:
        """Takes a request to join. The same request again is answered as it stands now.

        Returns:
            ``waiting`` for a person, or ``enrolled``.

        Raises:
            Refusal: malformed, unknown, expired, used or removed. Without the secret it is unknown, whatever there is.
        """
        site, secret, public, proof = _fields(body)
        self._known(site, secret)
        with self._alone():
            facts = self._known(site, secret)  # as it stands under the lock
            key = hashlib.sha256(public).hexdigest()
            if facts["key"] not in ("", key) or facts["unfit"] >= _MOST_UNFIT:
                raise Refusal("used")
            if not facts["key"]:
                if self.clock() > int(facts["until"]):
                    raise Refusal("expired")
                self._bind(site, facts, public, proof)
            if read_file(self._enrolled(site)) == public:
                return "enrolled"
            if not self._asked(site).exists():
                write_atomic(self._asked(site), public)
        return "waiting"

    def _known(self, site: str, secret: str) -> dict[str, Any]:
        """The record of an invitation, to who has its secret."""
        try:
            facts = load_record(self._file(site), _KIND, hint=_HINT)
        except FedLoRAError:
            facts = None
        if facts is None or not hmac.compare_digest(str(facts["secret"]), secret_digest(secret)):
            raise Refusal("unknown")
        return facts

    def _bind(self, site: str, facts: dict[str, Any], public: bytes, proof: tuple[bytes, bytes]) -> None:
        """Binds an invitation to a file of keys; a few unfit ones use it up, and what is wrong with this server's files none."""
        enrolled, pin = self._enrolled_keys(), self.pin()
        try:
            _check_keys(site, public, enrolled)
            check_proof(proof, public, pin=pin)
        except FedLoRAError:
            save_record(self._file(site), _KIND, {**facts, "unfit": facts["unfit"] + 1})
            raise Refusal("malformed") from None
        if self._removed(public):  # the line stays good: its site makes new keys
            raise Refusal("removed")
        save_record(self._file(site), _KIND, {**facts, "key": hashlib.sha256(public).hexdigest()})

    # --- what they share ------------------------------------------------------------------------------------------

    def _removed(self, blob: bytes) -> bool:
        """Whether these keys were enrolled here once and are not any more: Flower never takes a key again that was removed."""
        return PublicIdentity.parse(blob.decode("ascii")).fingerprint() in removed_keys(self.home)

    def _public(self) -> tuple[bytes, bytes]:
        found = read_file(self.home / "tls" / "ca.crt"), read_file(self.home / "server.pub")
        if found[0] is None or found[1] is None:
            raise KeyFileError(
                f"{self.home} is not the directory of a server", hint="name the one that `fedlora server init` made"
            )
        return found[0], found[1]

    def _enrolled_keys(self) -> dict[str, _Keys]:
        """Of each enrolled site; a file is read again when it has changed. A damaged one raises KeyFileError, by its name."""
        files = {p: ((s := p.stat()).st_mtime_ns, s.st_size) for p in sorted((self.home / "sites").glob("*.pub"))}
        self._read = {p: self._read[p] if p in self._read and self._read[p][0] == at else (at, _keys_in(p))
                      for p, at in files.items()}  # fmt: skip
        return {path.stem: keys for path, (_, keys) in self._read.items()}

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One process at a time changes what is invited, asked and enrolled."""
        directory = self.home / "invitations"
        directory.mkdir(exist_ok=True, mode=0o700)
        with open(os.open(directory / "lock", os.O_RDWR | os.O_CREAT, 0o600), "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _file(self, site: str) -> Path:
        return self.home / "invitations" / f"{site}.json"

    def _asked(self, site: str) -> Path:
        return self.home / "requests" / f"{site}.pub"

    def _enrolled(self, site: str) -> Path:
        return self.home / "sites" / f"{site}.pub"


def waiting(home: Path) -> set[str]:
    """Names of the sites whose keys wait for a person."""
    return {path.stem for path in (home / "requests").glob("*.pub")}


def answer_join(invitations: Invitations, body: bytes, method: str) -> tuple[int, bytes]:
    """Status and body for a call of :data:`JOIN`; whatever is wrong with the server's own files is 503."""
    try:
        return 200, invitations.offer() if method == "GET" else canonical({"state": invitations.ask(body)})
    except Refusal as e:
        return 403, canonical({"why": e.why})
    except (FedLoRAError, OSError, KeyError, ValueError, TypeError) as e:
        log.warning("joining: %s", e if isinstance(e, FedLoRAError) else type(e).__name__)
        return 503, b""


def dump_ask(invitation: Invitation, public: bytes, identity: Identity, node: ec.EllipticCurvePrivateKey) -> bytes:
    """The body of a request to join; both keys sign it, so that nobody joins with those of another site."""
    text = _signed(invitation.pin, public)
    proof = identity.signing.sign(text), node.sign(text, ec.ECDSA(hashes.SHA256()))
    facts = {"name": invitation.site, "secret": invitation.secret, "site": public.decode("ascii")}
    return canonical({**facts, "proof": [base64.b64encode(p).decode() for p in proof]})


def check_proof(proof: tuple[bytes, bytes], public: bytes, *, pin: str) -> None:
    """Whether who sends a public file has its signing key and its connection's key.

    Raises:
        BadSignature: no.
    """
    keys, text = _keys(public), _signed(pin, public)
    node = load_pem_public_key(keys.node)
    try:
        Ed25519PublicKey.from_public_bytes(keys.signing).verify(proof[0], text)
        if isinstance(node, ec.EllipticCurvePublicKey):
            node.verify(proof[1], text, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        raise BadSignature("the request to join is not signed by the keys that it holds") from None


def _signed(pin: str, public: bytes) -> bytes:
    return b"fedlora/v1/join\0" + pin.encode() + b"\0" + public


def _fields(body: bytes) -> tuple[str, str, bytes, tuple[bytes, bytes]]:
    try:
        facts: dict[str, Any] = parse_object(body)
        proof = [base64.b64decode(p, validate=True) for p in facts.pop("proof")]
        if set(facts) != {"name", "secret", "site"} or not all(isinstance(x, str) for x in facts.values()) or len(proof) != 2:
            raise ValueError
        facts["secret"].encode("ascii")  # here, before it matters whether the name is invited
        return check_site_name(facts["name"]), facts["secret"], facts["site"].encode("ascii"), (proof[0], proof[1])
    except (ValueError, KeyError, TypeError, ConfigError):
        raise Refusal("malformed") from None


@dataclass(frozen=True, slots=True)
class _Keys:
    """All keys of a site's public file."""

    name: str
    signing: bytes
    kem: bytes
    node: bytes


def _check_keys(site: str, blob: bytes, enrolled: Mapping[str, _Keys]) -> None:
    """One key at two sites would have every site refuse every task.

    Raises:
        KeyFileError: the file is malformed, another site's, or shares a key with an enrolled one.
    """
    mine = _keys(blob)
    if mine.name != site:
        raise KeyFileError(f"{site} has sent the keys of {mine.name}", hint=_HINT)
    for other, theirs in enrolled.items():
        if other != site and {mine.signing, mine.kem, mine.node} & {theirs.signing, theirs.kem, theirs.node}:
            raise KeyFileError(f"{site} and {other} share a key", hint="one of them copied it: ask both for new keys")


def _keys_in(path: Path) -> _Keys:
    try:
        return _keys(read_file(path) or b"")
    except FedLoRAError as e:
        hint = "put the site's .pub file there again, or take this one away; nobody joins before"
        raise KeyFileError(f"{path} is damaged: {e}", hint=hint) from None


def _keys(blob: bytes) -> _Keys:
    try:
        text = blob.decode("ascii")
    except UnicodeDecodeError:
        raise KeyFileError("the file is no text", hint=_HINT) from None
    lines = text.splitlines()
    if len(lines) < 2:
        raise KeyFileError("the file has no second line with the connection's key", hint=_HINT)
    public = PublicIdentity.parse(text)
    return _Keys(public.name, public.signing, public.kem, node_key_pem(lines[1]))
