"""What monitoring hears of a site: the words of its status, and nothing of its rows."""

from __future__ import annotations

import re

import pytest

from fedlora.core.sites.standing import STANDINGS
from fedlora.formats.files import save_record
from fedlora.site.health import READY, SiteHealth
from fedlora.site.progress import FILE

FACTS = {
    "site": "alpha", "server": "fed:8443", "standing": "ready", "why": "", "cure": "", "since": 1, "updated": 2, "running": True,
    "round": 3, "rounds": 8, "step": 0, "steps": 0, "loss": None, "eta_s": None, "messages": 7, "sent_bytes": 4096,
    "codes": {"data": 2}, "refused": None,
    "last": None,
}  # fmt: skip


@pytest.fixture
def known(tmp_path, monkeypatch):
    """Sets what the status file says."""

    def says(**more):
        facts = {**FACTS, **more}
        monkeypatch.setattr("fedlora.site.health.load_state", lambda state: facts)

    return says


@pytest.mark.parametrize("word", sorted(STANDINGS))
def test_a_site_is_ready_where_it_can_take_part_and_each_no_says_why(tmp_path, known, word):
    known(standing=word, why="zz is amiss", cure="mend zz")
    health = SiteHealth("alpha", tmp_path)
    assert health.answer("/healthz") == (200, "text/plain; charset=utf-8", "ok\n")
    status, _, said = health.answer("/readyz")
    assert status == (200 if word in READY else 503)
    assert (said == "ok\n") == (word in READY)
    if word not in READY:
        assert said == f"{word}: zz is amiss; mend zz\n"
    text = health.answer("/metrics")[2]
    assert f"fedlora_up {int(word in READY)}\n" in text
    ones = re.findall(r'fedlora_site_standing\{site="alpha",standing="([a-z]+)"\} 1\n', text)
    assert ones == [word]
    assert len(re.findall(r"^fedlora_site_standing\{", text, re.M)) == len(STANDINGS)


def test_the_numbers_are_those_of_the_status_and_what_is_not_known_is_left_out(tmp_path, known):
    known(last={"before": 5.5, "after": 5.25, "nll": None})
    text = SiteHealth("alpha", tmp_path).metrics()
    for line in (
        "fedlora_site_round 3", "fedlora_site_rounds 8", "fedlora_site_messages 7", "fedlora_site_sent_bytes 4096",
        'fedlora_site_loss{of="before"} 5.5', 'fedlora_site_loss{of="after"} 5.25', 'fedlora_site_refusals{code="data"} 2',
    ):  # fmt: skip
        assert f"{line}\n" in text
    assert "held-out" not in text
    known(last=None)
    assert "fedlora_site_loss{" not in SiteHealth("alpha", tmp_path).metrics()


def test_a_site_that_hangs_is_not_healthy_and_a_status_that_is_gone_or_damaged_is_not_ready(tmp_path):
    now = [0.0]
    health = SiteHealth("alpha", tmp_path, clock=lambda: now[0])
    assert health.answer("/readyz")[0] == 503
    assert "fedlora_up 0\n" in health.metrics()
    save_record(tmp_path / FILE, "status", FACTS)
    assert health.answer("/readyz")[0] == 200
    (tmp_path / FILE).write_bytes(b"damaged")
    assert health.answer("/readyz")[:1] + health.answer("/readyz")[2:] == (503, "nothing is known yet\n")
    now[0] = 31.0
    assert health.answer("/healthz")[0] == health.answer("/readyz")[0] == 503
    assert "has not looked at its processes for 31 s" in health.healthz()
    health.note()
    assert health.answer("/healthz")[0] == 200
    assert health.answer("/anything")[0] == 404
