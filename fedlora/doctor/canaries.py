"""Is a text of the rows in bytes that are about to leave? Looks for it as it stands, not for what it means."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

_WINDOW = 8


def holds_any(blob: bytes, texts: Iterable[str]) -> bool:
    """Whether 15 bytes or more that follow each other in one of the texts (UTF-8) also do in ``blob``.

    Law: every such stretch holds eight bytes that begin at a multiple of eight in its text, and these are looked for at every
    place. By chance it is true about once in 2**64 / (windows * bytes) blobs. 8 passes over the blob, 16 times its memory.
    """
    known = _windows(texts)
    if not known.size:
        return False
    return any(bool(np.isin(_words(blob, at), known).any()) for at in range(_WINDOW))


def _windows(texts: Iterable[str]) -> NDArray[np.uint64]:
    """The first eight bytes of each text, the next eight, and so on; none of a single character repeated."""
    found = [_words(text.encode("utf-8", "replace"), 0) for text in texts]
    words = np.unique(np.concatenate(found)) if found else np.zeros(0, np.uint64)
    plain = words.view(np.uint8).reshape(-1, _WINDOW)
    repeated = (plain == plain[:, :1]).all(axis=1)
    return np.asarray(words[~repeated])


def _words(blob: bytes, at: int) -> NDArray[np.uint64]:
    count = max(len(blob) - at, 0) // _WINDOW
    return np.frombuffer(blob, np.uint64, count, at) if count else np.zeros(0, np.uint64)
