"""What the server sees of one site is uniform noise; and so is a sum in which one view differs anywhere."""

from dataclasses import replace

import numpy as np
import pytest
from protect.secagg.world import identity, names

from fedlora.core.reader import Reader
from fedlora.protect.secagg.giving import masks_of, reveal
from fedlora.protect.secagg.protocol.cohort import Cohort, SessionRequirements
from fedlora.protect.secagg.protocol.dealing import Inbox, Secrets, advertise, deal, receive
from fedlora.protect.secagg.protocol.masks import add_masks
from fedlora.protect.secagg.protocol.opening import Deal, parse_reveal, relay, unmask
from fedlora.protect.secagg.protocol.rings import PROFILES, pack, unpack

pytestmark = pytest.mark.slow

RULES, N, SIZE = SessionRequirements(1, 3), 4, 400_000


def known(name):
    return identity(name).public


def cohort_in(context, secrets):
    adverts = [
        advertise(name, context, secrets[i], key=identity(name).signing, measured=True) for i, name in enumerate(names(N), 1)
    ]
    return Cohort.of(adverts, RULES)


SECRETS = {i: Secrets(bytes([i]) * 32) for i in range(1, N + 1)}
COHORT = cohort_in(b"c" * 32, SECRETS)
DEALS = {i: Deal.parse(COHORT, i, deal(COHORT, i, s, key=identity(names(N)[i - 1]).signing)) for i, s in SECRETS.items()}


def inbox_of(number, cohort=COHORT, deals=DEALS):
    return receive(
        cohort, number, SECRETS[number], Reader(relay(cohort, deals, number), "relay"), requirements=RULES, known=known
    ).inbox


INBOXES = {i: inbox_of(i) for i in SECRETS}


def values(number, profile):
    """What training gives: small whole numbers around zero, far from uniform."""
    drawn = np.random.default_rng(number).normal(0, profile.levels / 8, SIZE)
    return np.clip(np.rint(drawn), -profile.levels, profile.levels).astype(np.int64)


def masked(number, profile, *, cohort=COHORT, inbox=None):
    vector = (values(number, profile) % (1 << profile.bits)).astype(profile.word)
    add_masks(vector, masks_of(cohort, number, SECRETS[number], inbox or INBOXES[number])[0])
    return unpack(pack(vector, profile.bits), SIZE, profile.bits)


def sum_of(vectors, profile):
    """Opened with what all reveal."""
    total, numbers = np.zeros(SIZE, profile.word), np.zeros(3, np.uint64)
    for vector in vectors.values():
        total += vector

    class Counted:
        def __init__(self, number):
            self.number = number

    shares = {i: reveal(COHORT, INBOXES[i], [Counted(j) for j in vectors]) for i in vectors}
    revealed = {i: parse_reveal(COHORT, DEALS, list(vectors), i, raw) for i, raw in shares.items()}
    unmask(COHORT, DEALS, list(vectors), revealed, total, numbers)
    return total.astype(np.int64) % (1 << profile.bits)


def assert_uniform(words, profile):
    """Chi-square over bytes and over the top bits: 5 sigma on either side. Too even would be as wrong as too uneven."""
    bits = np.unpackbits(np.frombuffer(pack(words, profile.bits), np.uint8))
    for counts in (
        np.bincount(np.packbits(bits), minlength=256),
        np.bincount((words.astype(np.int64) % (1 << profile.bits)) >> (profile.bits - 4), minlength=16),
    ):
        expected = counts.sum() / counts.size
        chi = float(((counts - expected) ** 2 / expected).sum())
        degrees = counts.size - 1
        assert abs(chi - degrees) < 5 * (2 * degrees) ** 0.5


def correlation(x, y):
    return float(np.corrcoef(x.astype(np.float64), y.astype(np.float64))[0, 1])


@pytest.mark.parametrize("ring", PROFILES)
def test_a_masked_update_is_uniform_and_says_nothing_of_what_is_in_it(ring):
    profile = PROFILES[ring]
    seen = masked(2, profile)
    assert_uniform(seen, profile)
    for number in SECRETS:
        assert abs(correlation(seen, values(number, profile))) < 5 / SIZE**0.5
    assert abs(correlation(seen, masked(3, profile))) < 5 / SIZE**0.5


@pytest.mark.parametrize("ring", PROFILES)
def test_a_sum_of_two_masked_updates_is_noise_without_what_is_revealed(ring):
    profile = PROFILES[ring]
    assert_uniform(masked(1, profile) + masked(2, profile), profile)
    difference = masked(1, profile) - masked(2, profile)
    assert_uniform(difference, profile)
    assert abs(correlation(difference, values(1, profile) - values(2, profile))) < 5 / SIZE**0.5


def test_all_together_they_are_the_sum():
    profile = PROFILES["int8"]
    total = sum_of({i: masked(i, profile) for i in SECRETS}, profile)
    assert np.array_equal(total, sum(values(i, profile) for i in SECRETS) % (1 << profile.bits))


def other_ingredient(number, peer):
    inbox = INBOXES[number]
    return Inbox(inbox.shares, {**inbox.ingredients, peer: b"x" * 32})


def other_key(number, peer):
    """The cohort as site ``number`` would see it if the server had swapped a peer's keys (and could sign for it)."""
    stranger = Secrets(b"s" * 32)
    adverts = list(COHORT.adverts)
    name = adverts[peer - 1].name
    adverts[peer - 1] = advertise(name, b"c" * 32, stranger, key=identity(name).signing, measured=True)
    return Cohort.of(adverts, RULES)


VIEWS = {
    "another task": lambda: masked(1, PROFILES["int8"], cohort=cohort_in(b"d" * 32, SECRETS)),
    "another key of a peer": lambda: masked(1, PROFILES["int8"], cohort=other_key(1, 3)),
    "another ingredient": lambda: masked(1, PROFILES["int8"], inbox=other_ingredient(1, next(iter(INBOXES[1].ingredients)))),
    "one peer fewer": lambda: masked(
        1, PROFILES["int8"], inbox=Inbox({k: v for k, v in INBOXES[1].shares.items() if k != 4}, INBOXES[1].ingredients)
    ),
}


@pytest.mark.parametrize("view", VIEWS)
def test_one_view_that_differs_anywhere_makes_the_sum_noise(view):
    profile = PROFILES["int8"]
    total = sum_of({1: VIEWS[view](), **{i: masked(i, profile) for i in (2, 3, 4)}}, profile)
    truth = sum(values(i, profile) for i in SECRETS)
    assert_uniform(total, profile)
    assert abs(correlation(total, truth)) < 5 / SIZE**0.5


def test_the_names_of_sessions_differ_in_whatever_sites_must_agree_on():
    t1 = {COHORT.t1, cohort_in(b"d" * 32, SECRETS).t1, other_key(1, 3).t1}
    t1.add(Cohort.of(COHORT.adverts[:3], RULES).t1)
    t1.add(Cohort.of([replace(COHORT.adverts[0], promise=b"p" * 32), *COHORT.adverts[1:]], RULES).t1)
    assert len(t1) == 5
