"""Masks are one stream a key, however many threads and pieces they are made in."""

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given
from hypothesis import strategies as st

from fedlora.processes import threads
from fedlora.protect.secagg.protocol import masks
from fedlora.protect.secagg.protocol.masks import add_masks

KEYS = [(bytes([i]) * 32, sign) for i, sign in enumerate((1, -1, 1))]


def expected(vector: np.ndarray) -> np.ndarray:
    out = vector.copy()
    for key, sign in KEYS:
        stream = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor().update(bytes(vector.nbytes))
        out += np.frombuffer(stream, vector.dtype) * vector.dtype.type(sign % (1 << 8 * vector.itemsize))
    return out


@pytest.mark.parametrize("word", [np.uint16, np.uint32, np.uint64])
@pytest.mark.parametrize("cores", [1, 2, 3])
@given(size=st.integers(0, 1500), chunk=st.sampled_from([16, 64, 512]), pieces=st.integers(1, 5))
def test_however_it_is_cut_the_stream_is_the_same(word, cores, size, chunk, pieces):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threads, "cores", lambda: cores)
        patch.setattr(masks, "_CHUNK", chunk)
        patch.setattr(masks, "_CHUNKS", pieces)
        vector = np.arange(size, dtype=word)
        want, ready = expected(vector), []
        add_masks(vector, KEYS, done=ready.append)
    assert (vector == want).all()
    assert [i for part in ready for i in range(part.start, part.stop)] == list(range(size))
    assert all(part.start % 2 == 0 for part in ready)


def test_an_error_in_a_piece_is_raised():
    def work(piece: int) -> int:
        return 1 // (3 - piece)

    with pytest.raises(ZeroDivisionError):
        list(threads.in_threads(work, range(8)))
