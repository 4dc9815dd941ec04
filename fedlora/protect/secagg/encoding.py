"""A site's update as integers, ready to be masked: levels, and the numbers that are summed with them. FORMAT.md, 10.6."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from fedlora.core.adapter import F32, Update
from fedlora.core.errors import UpdateRejected
from fedlora.core.messages import Task
from fedlora.formats.derive import derive
from fedlora.formats.keys import Identity
from fedlora.protect.secagg.protocol.numbers import Numbers
from fedlora.protect.secagg.protocol.rings import Profile, Words, encode
from fedlora.protect.secagg.records import Encoded
from fedlora.protect.secagg.terms import Terms
from fedlora.rules.sums import squares_of


def work_key(task: Task, scales: F32) -> str:
    """Key of an encoded update: the same task with the same scales always gives the same levels."""
    what = f"{task.kind}/{task.round}/{task.plan_digest}/{task.adapter.digest()}/".encode()
    return hashlib.sha256(what + scales.tobytes()).hexdigest()


def encode_update(task: Task, terms: Terms, scales: F32, update: Update, *, identity: Identity) -> Encoded:
    """An update as integer levels, with its numbers.

    Args:
        scales: value of one level, per tensor, (tensors,) float32.
        identity: the site's keys; the randomness of the rounding is derived from the signing key.

    Raises:
        WrongContext (wrong-layout), NonFiniteUpdate: see :meth:`Update.check`.
        UpdateRejected: no tokens were used.
        ValueError: a noisy gradient that is not in levels of the ring.
    """
    key = work_key(task, scales)
    if task.kind == "evaluate":
        numbers = terms.numbers(task.reply_layout).pack(
            weight=0, counted=0, squares=np.zeros(0), cut=np.zeros(0, np.int64), counters=update.counters
        )
        return Encoded(key, task.round, np.zeros(1, terms.profile.word), numbers)
    layout = task.reply_layout
    update.check(layout.size)
    if update.weight < 1:
        raise UpdateRejected("this site used no tokens; it does not take part in the round")
    if terms.private is not None:
        return Encoded(key, task.round, in_ring(update.delta, terms.profile), _constant(terms.numbers(layout), update))
    weight = terms.weight(update.weight)
    # Keep secret: knowing the rounding direction reveals which site changed the sum.
    secret = identity.signing.private_bytes_raw()
    noise = derive(secret, "rounding", context=f"{task.run}/{task.round}/{key}".encode())
    levels, cut = encode(update.delta, layout, terms.profile, scales, weight_fraction=terms.weight_fraction(weight), key=noise)
    numbers = terms.numbers(layout).pack(
        weight=weight, counted=update.weight, squares=squares_of(update.delta, layout), cut=cut, counters=update.counters
    )
    return Encoded(key, task.round, levels, numbers)


def in_ring(levels: F32, profile: Profile) -> Words:
    """A noisy gradient in whole levels as ring elements, (n,) words: nothing is rounded, cut or left for a later round any more.

    Args:
        levels: (n,) float32, as :func:`fedlora.privacy.coding.encode` gave them for this profile.

    Raises:
        ValueError: they are not whole, or beyond the profile's levels.
    """
    signed = levels.astype(np.int16 if profile.word is np.uint16 else np.int32)
    if not np.array_equal(signed, levels) or max(int(signed.max()), -int(signed.min())) > profile.levels:
        raise ValueError(f"not whole levels within {profile.levels}")
    return signed.view(profile.word)


def _constant(order: Numbers, update: Update) -> NDArray[np.uint64]:
    """The numbers beside a noisy gradient: those of any other site, but for counters over rows that are declared public."""
    nothing = np.zeros(order.tensors)
    return order.pack(weight=1, counted=0, squares=nothing, cut=nothing.astype(np.int64), counters=update.counters)
