"""Is a text of the rows in bytes that are about to leave? Looks for it as it stands, not for what it means."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

LEAST_BYTES = 8
"""Of a text that is looked for: fewer stand anywhere by chance."""
_WINDOW = LEAST_BYTES
_STRETCH = 15


def holds_any(blob: bytes, texts: Iterable[str]) -> bool:
    """Whether ``blob`` holds 15 bytes or more that follow each other in one of the texts (UTF-8), or a whole text of 8 to 14.

    Law: every such stretch holds eight bytes that begin at a multiple of eight in its text. These are looked for at every place,
    and where one is found, how far both go on alike. Texts of fewer than eight bytes are not looked for: they stand anywhere by
    chance. 8 passes over the blob, 16 times its memory.
    """
    whole = [text.encode("utf-8", "replace") for text in texts]
    known = _windows(whole)
    if not known.size:
        return False
    met = {word.tobytes() for at in range(_WINDOW) for word in np.intersect1d(_words(blob, at), known)}
    return bool(met) and any(_go_on_alike(blob, text, met) for text in whole)


def _go_on_alike(blob: bytes, text: bytes, met: set[bytes]) -> bool:
    """Whether one of the words that were met stands in a stretch that is long enough."""
    enough = min(_STRETCH, len(text))
    for start in range(0, len(text) - _WINDOW + 1, _WINDOW):
        if (word := text[start : start + _WINDOW]) not in met:
            continue
        at = blob.find(word)
        while at >= 0:
            before = _alike(blob[max(at - _STRETCH, 0) : at][::-1], text[max(start - _STRETCH, 0) : start][::-1])
            after = _alike(blob[at + _WINDOW : at + _WINDOW + _STRETCH], text[start + _WINDOW : start + _WINDOW + _STRETCH])
            if before + _WINDOW + after >= enough:
                return True
            at = blob.find(word, at + 1)
    return False


def _alike(one: bytes, other: bytes) -> int:
    """Bytes that both begin with."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _windows(texts: Iterable[bytes]) -> NDArray[np.uint64]:
    """The first eight bytes of each text, the next eight, and so on; none of a single character repeated."""
    found = [_words(text, 0) for text in texts]
    words = np.unique(np.concatenate(found)) if found else np.zeros(0, np.uint64)
    plain = words.view(np.uint8).reshape(-1, _WINDOW)
    repeated = (plain == plain[:, :1]).all(axis=1)
    return np.asarray(words[~repeated])


def _words(blob: bytes, at: int) -> NDArray[np.uint64]:
    count = max(len(blob) - at, 0) // _WINDOW
    return np.frombuffer(blob, np.uint64, count, at) if count else np.zeros(0, np.uint64)
