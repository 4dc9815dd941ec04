"""The line with which a site joins a federation, and the words that two people compare. FORMAT.md, section 13.

``fl1:NAME.PIN.SECRET@HOST:PORT``. The pin names the server's authority and key: a site compares it before it sends the secret,
so that the line, once it has come unchanged, shows the way to one server only.
"""

from __future__ import annotations

import base64
import hashlib
import re
import secrets
from dataclasses import dataclass, field
from typing import Final

from fedlora.core.errors import ConfigError
from fedlora.core.messages import check_site_name

SECRET_BYTES: Final = 16
WORDS: Final = 6
_LINE: Final = re.compile(r"fl1:([a-z0-9-]{1,63})\.([A-Za-z0-9_-]{43})\.([A-Za-z0-9_-]{22})@([A-Za-z0-9.:\[\]-]{3,270})")
_ANY: Final = re.compile(r"fl[0-9]+:[^\s'\"]*")
_HINT: Final = "copy the whole line that `fedlora server invite` printed: fl1:NAME.....@HOST:PORT"


def pin_of(authority: bytes, server: bytes) -> str:
    """Names a server: SHA-256 over its two public files, base64url without padding.

    Args:
        authority: the bytes of ``ca.crt``.
        server: the bytes of ``server.pub``.
    """
    head = b"fedlora/v1/invitation\0" + len(authority).to_bytes(4, "big")
    return _text(hashlib.sha256(head + authority + server).digest())


def secret_digest(secret: str) -> str:
    """What a server keeps of an invitation's secret: SHA-256 of its text, hex."""
    return hashlib.sha256(secret.encode()).hexdigest()


def words_of(pin: str, site: bytes) -> tuple[str, ...]:
    """Six words that are the same at both ends if both have the same keys: 66 bits of SHA-256, eleven for each word.

    Args:
        pin: of the server, :func:`pin_of`.
        site: the bytes of the site's ``.pub`` file.

    Returns:
        Words of the English list of BIP 39.
    """
    from mnemonic import Mnemonic

    digest = hashlib.sha256(b"fedlora/v1/words\0" + pin.encode() + b"\0" + site).digest()
    number, listed = int.from_bytes(digest, "big"), Mnemonic("english").wordlist
    return tuple(listed[number >> (256 - 11 * (i + 1)) & 2047] for i in range(WORDS))


@dataclass(frozen=True, slots=True)
class Invitation:
    """One site's invitation.

    Args:
        site: its name.
        pin: of the server, :func:`pin_of`.
        secret: shows that the caller has the invitation; 22 characters. Never in a repr.
        server: host:port.

    Raises:
        ConfigError: no site's name.
    """

    site: str
    pin: str
    secret: str = field(repr=False)
    server: str

    def __post_init__(self) -> None:
        check_site_name(self.site)

    @classmethod
    def new(cls, site: str, pin: str, server: str) -> Invitation:
        """One with a fresh secret."""
        return cls(site, pin, _text(secrets.token_bytes(SECRET_BYTES)), server)

    @classmethod
    def parse(cls, text: str) -> Invitation:
        """The one in a text, such as an e-mail; the text is not quoted in an error.

        Raises:
            ConfigError: there is none, more than one, or it is not whole.
        """
        found = dict.fromkeys(_ANY.findall(text))
        if len(found) != 1:
            raise ConfigError("there is no invitation in it" if not found else f"{len(found)} invitations in one", hint=_HINT)
        match = _LINE.fullmatch(next(iter(found)))
        if match is None:
            raise ConfigError("the invitation is not whole, or of another version of FedLoRA", hint=_HINT)
        return cls(*match.groups())

    def line(self) -> str:
        """Inverse of :meth:`parse`. Secret until it is used."""
        return f"fl1:{self.site}.{self.pin}.{self.secret}@{self.server}"


def _text(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()
