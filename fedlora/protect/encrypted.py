"""Records in a site's memory that only this site can read: whoever takes the disk without its key learns nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from fedlora.core.errors import StoreError
from fedlora.formats.files import dump_record, parse_record
from fedlora.formats.memory import Memory

_NONCE: Final = 12


@dataclass(frozen=True, slots=True)
class EncryptedMemory:
    """AES-256-GCM (NIST SP 800-38D) around a record, bound to what it is a record of.

    Args:
        memory: durable.
        key: 32 bytes, of this purpose alone.
        entropy: n random bytes.
    """

    memory: Memory
    key: bytes
    entropy: Callable[[int], bytes]

    def get(self, key: str, kind: str) -> dict[str, Any] | None:
        """What :meth:`put` put last; None only if nothing was ever put.

        Raises:
            ValueError: something else lies there, or it is of another key. What that means is the caller's to say.
            StoreError: the memory cannot give it.
        """
        blob = self.memory.get(key)
        if blob is None:
            return None
        try:
            plain = AESGCM(self.key).decrypt(blob[:_NONCE], blob[_NONCE:], kind.encode())
            return parse_record(plain, kind, key)
        except (InvalidTag, ValueError, StoreError):
            raise ValueError("not what was put there") from None

    def put(self, key: str, kind: str, facts: Mapping[str, Any]) -> None:
        """On the disk when this returns."""
        nonce = self.entropy(_NONCE)
        self.memory.put(key, nonce + AESGCM(self.key).encrypt(nonce, dump_record(kind, facts), kind.encode()))

    def __repr__(self) -> str:
        return "EncryptedMemory()"
