"""Records in a site's memory, encrypted under the site's key: a stolen disk reveals nothing without that key."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from fedlora.core.errors import StoreError
from fedlora.formats.files import dump_record, parse_record
from fedlora.formats.state.memory import Memory

_NONCE: Final = 12


@dataclass(frozen=True, slots=True)
class EncryptedMemory:
    """AES-256-GCM (NIST SP 800-38D) around a record. The kind of record is authenticated with it.

    Args:
        memory: durable.
        key: 32 bytes, used for this purpose only.
        entropy: n random bytes.
    """

    memory: Memory
    key: bytes
    entropy: Callable[[int], bytes]

    def get(self, key: str, kind: str) -> dict[str, Any] | None:
        """The record that :meth:`put` stored last; None only if none was ever stored.

        Raises:
            ValueError: the stored bytes are damaged or of another key. The caller decides what that means.
            StoreError: the memory cannot be read.
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
        """Stores a record; it is on the disk when this returns."""
        nonce = self.entropy(_NONCE)
        self.memory.put(key, nonce + AESGCM(self.key).encrypt(nonce, dump_record(kind, facts), kind.encode()))

    def __repr__(self) -> str:
        return "EncryptedMemory()"
