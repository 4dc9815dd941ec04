"""How much a site reads of what is asked of it: no more than the roster's sites can make necessary."""

import struct
import tracemalloc

import pytest
from protect.secagg.adversary import Adversary
from protect.secagg.test_failures import STEPS, Tale
from protect.secagg.world import World
from raising import raising

from fedlora.core.errors import Oversized, WireError
from fedlora.core.reader import Reader
from fedlora.protect.secagg.protocol.cohort import Cohort
from fedlora.protect.secagg.protocol.lengths import most_request_bytes
from fedlora.protect.secagg.protocol.votes import Delivered, read_certificate
from fedlora.protect.secagg.terms import Offer

SITE = "site-1"
LONG = 12 << 20
"""Below what the site's policy takes."""
CERTIFICATES = bytes([255]) + (bytes(32) + struct.pack(">H", 65535) + bytes(65535 * 66)) * 2


@pytest.mark.parametrize("step", STEPS[1:])
def test_a_request_longer_than_the_roster_allows_is_refused_before_it_is_read(step):
    tale = Tale()
    tale.until(step)
    payload = (CERTIFICATES + bytes(LONG))[:LONG]
    assert tale.server.say(SITE, step, payload) == "oversized"
    tracemalloc.start()
    try:
        tale.server.world.answer(tale.server.last)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert isinstance(tale.of(step, SITE), bytes)


@pytest.mark.parametrize("step", ["complain", "open"])
def test_what_is_asked_of_few_sites_is_bounded_too(step):
    a = Adversary(world=World(5)).until_masked()
    assert a.say(SITE, step, bytes(most_request_bytes(step, 5) + (1 << 20))) == "oversized"


def test_the_longest_requests_are_those_of_a_full_roster():
    """In bytes, as FORMAT.md has them."""
    found = {step: most_request_bytes(step, 256) for step in (*STEPS[1:], "complain", "open")}
    assert found == {
        "share": 1048578, "mask": 4990979, "complain": 648194, "open": 12731426, "vote": 25123, "unmask": 16930,
    }  # fmt: skip


@pytest.mark.parametrize(
    "read",
    [read_certificate, Delivered.read_all, lambda reader: Cohort.parse(reader.rest(), None, None)],
    ids=["votes", "deliveries", "cohort"],
)
def test_more_sites_than_a_roster_has_are_not_read(read):
    with raising(WireError, code="wire", match="257 sites, at most 256"):
        read(Reader(struct.pack(">H", 257), "test"))


def test_a_roster_longer_than_one_may_be_is_not_copied():
    with raising(Oversized, code="oversized"):
        Offer.parse(struct.pack(">I", (4 << 20) + 1))
