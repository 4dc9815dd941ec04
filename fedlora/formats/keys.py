"""Keys: an Ed25519 key to sign with and a hybrid ML-KEM-768 + X25519 key to be sealed to."""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import MLKEM768X25519PrivateKey, MLKEM768X25519PublicKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

from fedlora.core.errors import BadSignature, FedLoRAError, KeyFileError

KEM_BYTES = 1184 + 32
"""A public sealing key: ML-KEM-768 then X25519, raw."""

_HEAD = "fedlora-key-v1"
_PUBLIC = "fedlora-public-v1"
_FINGERPRINT = "fingerprint"
_NAME = re.compile(r"[a-z0-9-]{1,63}")
_PEM = re.compile(r"-----BEGIN PRIVATE KEY-----.*?-----END PRIVATE KEY-----\n", re.DOTALL)

# The eight small-order points in every encoding that a lenient decoder takes: a signature by such a key is valid for any
# message. The sign bit is masked off before comparing. Source: Chalkias, Garillot, Nikolaenko, Taming the many EdDSAs, 2020.
_SMALL_ORDER = frozenset(
    bytes.fromhex(x)
    for x in (
        "0100000000000000000000000000000000000000000000000000000000000000",
        "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        "0000000000000000000000000000000000000000000000000000000000000000",
        "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
        "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
    )
)
_P25519 = (1 << 255) - 19


def key_id(key: bytes) -> str:
    """Names a public key: SHA-256 of its raw bytes, hex."""
    return hashlib.sha256(key).hexdigest()


@lru_cache(maxsize=1024)  # a message names the same few keys again and again, and each costs three operations on curves
def _kem_key(raw: bytes) -> MLKEM768X25519PublicKey:
    x25519 = X25519PublicKey.from_public_bytes(raw[1184:])
    X25519PrivateKey.generate().exchange(x25519)  # refuses points of small order, to which nothing can be sealed
    return MLKEM768X25519PublicKey(MLKEM768PublicKey.from_public_bytes(raw[:1184]), x25519)


@dataclass(frozen=True, slots=True)
class PublicIdentity:
    """What others know of a site or server.

    Args:
        name: site name, or ``server``.
        signing: Ed25519 public key, 32 bytes.
        kem: ML-KEM-768 (1184 bytes) then X25519 (32 bytes) public key.

    Raises:
        BadSignature: the signing key is of small order or not canonical, so that anybody could sign for it.
        KeyFileError: a length or the name is wrong, or the KEM key is not one.
    """

    name: str
    signing: bytes
    kem: bytes

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name) or len(self.signing) != 32 or len(self.kem) != KEM_BYTES:
            raise KeyFileError("not a public key of FedLoRA", hint="copy the whole .pub file")
        y = bytes([*self.signing[:31], self.signing[31] & 0x7F])
        if y in _SMALL_ORDER or int.from_bytes(y, "little") >= _P25519:
            raise BadSignature(f"the signing key of {self.name} is of small order or not canonical")
        self.kem_key()

    def kem_key(self) -> MLKEM768X25519PublicKey:
        """The sealing key as the library wants it."""
        try:
            return _kem_key(self.kem)
        except ValueError:
            raise KeyFileError(f"the sealing key of {self.name} is malformed") from None

    def verify_key(self) -> Ed25519PublicKey:
        """The signing key as the library wants it."""
        return Ed25519PublicKey.from_public_bytes(self.signing)

    def has_signed(self, text: bytes, signature: bytes) -> bool:
        """Whether this is the key's signature over a text."""
        try:
            self.verify_key().verify(signature, text)
        except InvalidSignature:
            return False
        return True

    @property
    def signing_id(self) -> str:
        return key_id(self.signing)

    @property
    def kem_id(self) -> str:
        return key_id(self.kem)

    def line(self) -> str:
        """One line of text: ``fedlora-public-v1 NAME BASE64``."""
        return f"{_PUBLIC} {self.name} {base64.b64encode(self.signing + self.kem).decode()}"

    def file(self, *more: str) -> str:
        """The text of a ``.pub`` file: :meth:`line`, what else there is to say, and the fingerprint, by which damage shows."""
        return "\n".join([self.line(), *more, f"{_FINGERPRINT} {self.name} {self.fingerprint()}", ""])

    @classmethod
    def parse(cls, line: str) -> PublicIdentity:
        """Inverse of :meth:`line` and of :meth:`file`.

        Raises:
            KeyFileError, BadSignature: malformed, a dangerous key, or not the one whose fingerprint stands with it.
        """
        first, _, more = line.strip().partition("\n")
        try:
            head, name, text = first.split()
            raw = base64.b64decode(text, validate=True)
        except (ValueError, binascii.Error):
            head, name, raw = "", "", b""
        if head != _PUBLIC:
            raise KeyFileError(f"expected a line '{_PUBLIC} NAME ...'", hint="copy the whole .pub file")
        found = cls(name, raw[:32], raw[32:])
        said = [x for x in more.splitlines() if x.strip() and not x.startswith("ecdsa-sha2-nistp384 ")]
        if said not in ([], [f"{_FINGERPRINT} {found.name} {found.fingerprint()}"]):
            raise KeyFileError("the key does not match the fingerprint beside it", hint="copy the whole .pub file")
        return found

    def fingerprint(self) -> str:
        """40 hex digits of SHA-256 over both keys, in groups of four, to be read over the telephone."""
        digest = hashlib.sha256(b"fedlora/v1/fingerprint\0" + self.signing + self.kem).hexdigest()[:40]
        return " ".join(digest[i : i + 4] for i in range(0, 40, 4))


@dataclass(frozen=True, slots=True, repr=False)
class Identity:
    """Private keys. Shows only its name and fingerprint.

    Python cannot wipe memory reliably; keep core dumps off.

    Attributes:
        public: the part that others may see.

    Raises:
        KeyFileError: the name is wrong.
    """

    name: str
    signing: Ed25519PrivateKey
    mlkem: MLKEM768PrivateKey
    x25519: X25519PrivateKey
    public: PublicIdentity = field(init=False, compare=False)

    def __post_init__(self) -> None:
        kem = self.mlkem.public_key().public_bytes_raw() + self.x25519.public_key().public_bytes_raw()
        object.__setattr__(self, "public", PublicIdentity(self.name, self.signing.public_key().public_bytes_raw(), kem))

    @classmethod
    def generate(cls, name: str) -> Identity:
        """Fresh keys from the operating system."""
        return cls(name, Ed25519PrivateKey.generate(), MLKEM768PrivateKey.generate(), X25519PrivateKey.generate())

    @classmethod
    def derived(cls, name: str, secret: bytes) -> Identity:
        """Keys that follow from a secret, the same each time: for rehearsals, whose bits must repeat."""

        def seed(part: str, size: int) -> bytes:
            info = f"fedlora/v1/derived/{part}\0{name}".encode()
            return HKDF(hashes.SHA256(), size, salt=None, info=info).derive(secret)

        return cls(
            name,
            Ed25519PrivateKey.from_private_bytes(seed("ed25519", 32)),
            MLKEM768PrivateKey.from_seed_bytes(seed("ml-kem-768", 64)),
            X25519PrivateKey.from_private_bytes(seed("x25519", 32)),
        )

    def kem_key(self) -> MLKEM768X25519PrivateKey:
        """The unsealing key as the library wants it."""
        return MLKEM768X25519PrivateKey(self.mlkem, self.x25519)

    def __repr__(self) -> str:
        return f"Identity({self.name!r}, fingerprint={self.public.fingerprint()!r})"

    def save(self, path: Path) -> None:
        """Writes one text file, mode 0600: a head line, three PKCS#8 blocks (Ed25519, ML-KEM-768 seed, X25519), the fingerprint.

        Raises:
            KeyFileError: the file exists; a key is never overwritten.
        """
        blocks = "".join(
            key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
            for key in (self.signing, self.mlkem, self.x25519)
        )
        try:
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(f"{_HEAD} {self.name}\n{blocks}{_FINGERPRINT} {self.name} {self.public.fingerprint()}\n")
                file.flush()
                os.fsync(file.fileno())
        except FileExistsError:
            raise KeyFileError(f"{path} exists", hint="a key is never overwritten; choose another name or directory") from None


_OWN = "restore it from a backup; a new key (`fedlora keygen`) is a new identity that the other side must enrol"
_OTHERS = "ask its owner for the .pub file again, and compare its fingerprint by telephone"


def load_identity(path: Path) -> Identity:
    """Reads a private key.

    Raises:
        KeyFileError: missing, readable by others, malformed, or not the key whose fingerprint stands in the file.
    """
    try:
        mode, text = path.stat().st_mode, path.read_text()
    except FileNotFoundError:
        raise KeyFileError(
            f"there is no key {path}", hint="create it with `fedlora keygen`; if there was one, restore it"
        ) from None
    except (OSError, UnicodeDecodeError):
        raise KeyFileError(f"cannot read the key {path}", hint=_OWN) from None
    if mode & 0o077:
        raise KeyFileError(f"{path} can be read by others (mode {mode & 0o777:o})", hint=f"chmod 600 {path}")
    head, _, rest = text.partition("\n")
    words = head.split()
    try:
        keys = [load_pem_private_key(block.encode(), None) for block in _PEM.findall(rest)]
    except (ValueError, TypeError, UnsupportedAlgorithm):
        keys = []
    match keys:
        case [Ed25519PrivateKey() as signing, MLKEM768PrivateKey() as mlkem, X25519PrivateKey() as x25519] if (
            len(words) == 2 and words[0] == _HEAD and _NAME.fullmatch(words[1])
        ):
            found = Identity(words[1], signing, mlkem, x25519)
            if _PEM.sub("", rest).strip() in ("", f"{_FINGERPRINT} {found.name} {found.public.fingerprint()}"):
                return found
    raise KeyFileError(f"{path} is damaged, or is not a private key of FedLoRA", hint=_OWN)


def load_public(path: Path) -> PublicIdentity:
    """Reads a ``.pub`` file.

    Raises:
        KeyFileError, BadSignature: missing, malformed, a dangerous key, or not the one whose fingerprint stands in the file.
    """
    try:
        return PublicIdentity.parse(path.read_text())
    except (OSError, UnicodeDecodeError):
        raise KeyFileError(f"cannot read the public key {path}", hint=_OTHERS) from None
    except FedLoRAError as e:
        raise type(e)(f"{path}: {e}", hint=_OTHERS) from None
