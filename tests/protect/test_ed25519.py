"""Signatures are verified without the cofactor (FORMAT.md, 5.2): two verifiers that differ here would count votes differently."""

import hashlib

import pytest

from fedlora.core.errors import BadSignature
from fedlora.formats.keys import Identity, PublicIdentity
from fedlora.protect.secagg.protocol.cohort import check_signature

P = 2**255 - 19
L = 2**252 + 27742317777372353535851937790883648493
D = -121665 * pow(121666, -1, P) % P
B = (15112221349535400772501151409588531511454012693041857206046113283949847762202, 4 * pow(5, -1, P) % P)


def plus(a, b):
    """On -x^2 + y^2 = 1 + D x^2 y^2."""
    (x1, y1), (x2, y2) = a, b
    both = D * x1 * x2 * y1 * y2 % P
    return (x1 * y2 + x2 * y1) * pow(1 + both, -1, P) % P, (y1 * y2 + x1 * x2) * pow(1 - both, -1, P) % P


def times(n, a):
    out = (0, 1)
    for bit in bin(n)[2:]:
        out = plus(out, out)
        out = plus(out, a) if bit == "1" else out
    return out


def packed(a):
    return (a[1] | (a[0] & 1) << 255).to_bytes(32, "little")


def of_order_8():
    y = int.from_bytes(bytes.fromhex("c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a"), "little")
    square = (y * y - 1) * pow(D * y * y + 1, -1, P) % P
    x = pow(square, (P + 3) // 8, P)
    x = x if x * x % P == square else x * pow(2, (P - 1) // 4, P) % P
    return x, y


def signed(text, order):
    """A key with a part of this order, and a signature by it of the label ``vote`` that holds with the cofactor alone."""
    torsion = times(8 // order, of_order_8())
    a, message = 12345, b"fedlora/v1/sa/vote\0" + hashlib.sha256(text).digest()
    public = packed(plus(times(a, B), torsion))
    for r in range(1, 100):
        point = packed(times(r, B))
        k = int.from_bytes(hashlib.sha512(point + public + message).digest(), "little") % L
        if k % order:
            return public, point + ((r + k * a) % L).to_bytes(32, "little")
    raise AssertionError


@pytest.mark.parametrize("order", [2, 4, 8])
def test_a_signature_that_holds_with_the_cofactor_alone_is_refused(order):
    public, signature = signed(b"text", order)
    identity = PublicIdentity("site", public, Identity.derived("x", b"x").public.kem)  # such a key passes section 6
    with pytest.raises(BadSignature):
        check_signature(identity, "vote", b"text", signature)


def test_a_number_that_is_not_reduced_is_refused():
    key = Identity.derived("x", b"x")
    good = key.signing.sign(b"fedlora/v1/sa/vote\0" + hashlib.sha256(b"text").digest())
    check_signature(key.public, "vote", b"text", good)
    more = (int.from_bytes(good[32:], "little") + L).to_bytes(32, "little")
    with pytest.raises(BadSignature):
        check_signature(key.public, "vote", b"text", good[:32] + more)


def test_the_arithmetic_here_is_right():
    assert times(L, B) == (0, 1)
    assert times(8, of_order_8()) == (0, 1) != times(4, of_order_8())
