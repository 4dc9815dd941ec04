"""Reads bytes from front to back: a read returns as many bytes as were asked for, or raises a named error."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, Literal

from fedlora.core.errors import FedLoRAError, WireError


class Reader:
    """Reads bytes that came from elsewhere, from front to back. Lengths are compared before anything is copied.

    Args:
        blob: read, never changed; views share its memory.
        what: what the bytes are, for the text of an error.
        error: class of the error that is raised, or a function that makes one from its text.
    """

    def __init__(self, blob: bytes | memoryview, what: str, *, error: Callable[[str], FedLoRAError] = WireError) -> None:
        self._view, self._at, self._what, self._error = memoryview(blob).cast("B"), 0, what, error

    def take(self, n: int) -> bytes:
        """The next n bytes.

        Raises:
            WireError: there are fewer bytes; another class if one was given as ``error``.
        """
        return bytes(self.view(n))

    def view(self, n: int) -> memoryview:
        """The next n bytes, not copied."""
        if not 0 <= n <= self.left:
            raise self._error(f"{self._what}: cut short")
        self._at += n
        return self._view[self._at - n : self._at]

    def number(self, size: int = 2, *, order: Literal["big", "little"] = "big") -> int:
        """The next bytes as an unsigned number."""
        return int.from_bytes(self.view(size), order)

    def unpack(self, form: struct.Struct) -> tuple[Any, ...]:
        """The next bytes as the fields of ``form``."""
        return form.unpack(self.view(form.size))

    @property
    def left(self) -> int:
        """Bytes not read yet."""
        return len(self._view) - self._at

    def rest(self) -> bytes:
        """All that is left."""
        return self.take(self.left)

    def end(self) -> None:
        """Checks that all bytes were read.

        Raises:
            WireError: bytes are left; another class if one was given as ``error``.
        """
        if self.left:
            raise self._error(f"{self._what}: {self.left} bytes too many")
