"""Secure aggregation, beside flwr's own SecAgg+ in the same run: `python simulations/bench.py secagg`.

Rows, each case in a process of its own, so that a peak of memory is its own:

    secagg-site       from the float32 update to the bytes of the masked one
    secagg-server     the masked updates of N sites as they come, a tenth of which drops out; then the masks off their sum
    secagg-phase      a whole session over a toy layout, real keys and envelopes: one step of it, at the site and at the server
    secagg-handshake  the same session, all steps together; up_bytes without the step that brings the masked update
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from bench import ROOT, _sealed_parts, layout, median_s, peak_bytes, row, update

from fedlora.core.reader import Reader
from fedlora.formats.envelope import overhead, parse, seal
from fedlora.formats.keys import Identity, PublicIdentity
from fedlora.protect.secagg.giving import masked, reveal
from fedlora.protect.secagg.protocol.cohort import SIGNATURE, Cohort, SessionRequirements, read_session
from fedlora.protect.secagg.protocol.dealing import Inbox, Secrets, advertise, deal, receive
from fedlora.protect.secagg.protocol.numbers import Numbers
from fedlora.protect.secagg.protocol.opening import Deal, parse_reveal, relay, unmask
from fedlora.protect.secagg.protocol.rings import PROFILES, encode, packed_bytes, scales_for, sum_to_mean, unpack
from fedlora.protect.secagg.protocol.votes import Delivered
from fedlora.protect.secagg.records import Encoded, Records
from fedlora.rules.sums import squares_of

VALUES = 10_000_000
RULES = SessionRequirements(max_colluding=1, min_cohort=3)
COUNTERS = ("eval/nats", "eval/tokens", "train/nats", "train/tokens")
LIMIT_S = {("int8", 8): 0.10, ("int8", 32): 0.25}
LIMIT_UNMASK_S = 5.0
LIMIT_UP_BYTES = 20_100_000
LIMIT_HANDSHAKE_BYTES = 230_000


def main() -> None:
    """All rows."""
    for profile, peers in (("int8", 8), ("int8", 32), ("int4", 8), ("int12", 8), ("int16", 8), ("int24", 8)):
        ours = _case("_site", profile, peers)
        beside = _case("_flower", peers) if profile == "int8" else {}
        ratio = {"flower_ratio": beside["flower_s"] / ours["seconds"]} if beside else {}
        limits = {"limit_s": LIMIT_S[profile, peers], "limit_bytes": LIMIT_UP_BYTES} if profile == "int8" else {}
        row("secagg-site", profile=profile, peers=peers, **ours, **beside, **ratio, **limits)
    for sites in (10, 100):
        limit = {"limit_unmask_s": LIMIT_UNMASK_S} if sites == 100 else {}
        row("secagg-server", sites=sites, **_case("_server", sites), **limit)
    for sites in (5, 20, 100):
        found = _case("_session", sites)
        for phase in found["phases"]:
            row("secagg-phase", sites=sites, **phase)
        limit = {"limit_up_bytes": LIMIT_HANDSHAKE_BYTES} if sites == 100 else {}
        row("secagg-handshake", sites=sites, **found["whole"], **limit)


def _case(name: str, *args: object) -> dict[str, Any]:
    out = subprocess.run([sys.executable, __file__, name, *map(str, args)], stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(out.stdout))


@dataclass(frozen=True)
class Handshake:
    """``n`` sites that have dealt their shares: real keys, every bundle sealed."""

    cohort: Cohort
    secrets: Mapping[int, Secrets]
    deals: Mapping[int, Deal]
    identities: Mapping[str, Identity]
    publics: Mapping[str, PublicIdentity]

    @classmethod
    def of(cls, n: int) -> Handshake:
        identities = {f"site-{i:03d}": Identity.generate(f"site-{i:03d}") for i in range(1, n + 1)}
        secrets = {i: Secrets(os.urandom(32)) for i in range(1, n + 1)}
        adverts = [
            advertise(s, bytes(32), secrets[i], key=k.signing, measured=True) for i, (s, k) in enumerate(identities.items(), 1)
        ]
        cohort = Cohort.of(adverts, RULES)
        keys = {i: identities[cohort.advert(i).name].signing for i in secrets}
        deals = {i: Deal.parse(cohort, i, deal(cohort, i, s, key=keys[i])) for i, s in secrets.items()}
        return cls(cohort, secrets, deals, identities, {s: k.public for s, k in identities.items()})

    def receive(self, own: int, relayed: bytes) -> Inbox:
        reader = Reader(relayed, "relay")
        received = receive(self.cohort, own, self.secrets[own], reader, requirements=RULES, known=self.publics.__getitem__)
        reader.end()
        return received.inbox

    def sign(self, number: int, digest: bytes) -> Delivered:
        key = self.identities[self.cohort.advert(number).name].signing
        return Delivered.make(self.cohort, number, digest, key=key)


# --- a site ---------------------------------------------------------------------------------------------------------


class _Laps:
    """Seconds of each part of one run."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._at = time.perf_counter()

    def __call__(self, part: str) -> None:
        now = time.perf_counter()
        self.seconds[f"{part}_s"], self._at = now - self._at, now


def site(name: str, peers: int) -> dict[str, Any]:
    """What :class:`fedlora.protect.secagg.SecAggSite` computes between its float32 update and the masked one."""
    session, profile, shape = Handshake.of(peers + 1), PROFILES[name], layout(VALUES)
    own, one = (peers + 1) // 2, update(shape)
    relayed = relay(session.cohort, session.deals, own)
    scales = scales_for(shape, profile, reach=5e-3)
    ride = Numbers(len(shape.entries), COUNTERS)
    said = dict.fromkeys(COUNTERS, 1)
    levels = np.empty(0, profile.word)

    def step() -> tuple[dict[str, float], int]:
        nonlocal levels
        lap = _Laps()
        inbox = session.receive(own, relayed)
        lap("receive")
        one.check(shape.size)
        lap("check")
        levels, cut = encode(one.delta, shape, profile, scales, weight_fraction=1.0, key=bytes(32))
        lap("encode")
        numbers = ride.pack(weight=1, counted=one.weight, squares=squares_of(one.delta, shape), cut=cut, counters=said)
        lap("numbers")
        key = session.identities[session.cohort.advert(own).name].signing
        out, _ = masked(session.cohort, own, session.secrets[own], inbox, levels, numbers, bits=profile.bits, key=key)
        lap("mask")  # and packed, hashed, signed
        return lap.seconds, len(out)

    step()
    runs = [step() for _ in range(7)]
    peak = peak_bytes()
    parts = {part: statistics.median(seconds[part] for seconds, _ in runs) for part in runs[0][0]}
    whole = statistics.median(sum(seconds.values()) for seconds, _ in runs)
    # Besides these seconds: what the site writes before it answers, so that a power cut costs nothing; here to no disk at all.
    memory = _Nowhere()
    records = Records(memory, "run", next(iter(session.identities.values())), os.urandom)
    save = median_s(lambda: records.save_encoded(Encoded("key", 1, levels, np.zeros(ride.size, np.uint64))))
    return {"values": shape.size, "seconds": whole, **parts, "upload_bytes": runs[0][1] + overhead(1, runs[0][1]),
            "peak_rss_mb": peak / 1e6, "besides_save_s": save, "besides_save_bytes": memory.written}  # fmt: skip


class _Nowhere:
    """A memory that forgets."""

    written = 0

    def get(self, key: str) -> bytes | None:
        return None

    def put(self, key: str, *parts: bytes | memoryview) -> None:
        self.written = sum(len(part) for part in parts)

    def keys(self) -> list[str]:
        return []

    def where(self, key: str) -> str:
        return key


def flower(peers: int) -> dict[str, Any]:
    """The same step of flwr's SecAgg+, over the same tensors, as its client does it: decrypt, quantize, mask, to bytes."""
    from flwr.common import ndarrays_to_parameters
    from flwr.common.secure_aggregation.secaggplus_constants import Key

    theirs = importlib.import_module("flwr.client.mod.secure_aggregation.secaggplus_mod")  # its package has a function so named
    n = peers + 1
    settings = {Key.SAMPLE_NUMBER: n, Key.SHARE_NUMBER: n, Key.THRESHOLD: 2 * n // 3 + 1, Key.CLIPPING_RANGE: 8.0,
                Key.TARGET_RANGE: 1 << 22, Key.MOD_RANGE: 1 << 32, Key.MAX_UNITS: 2000.0}  # fmt: skip
    states, keys = {}, {}
    for node in range(1, n + 1):
        states[node] = theirs.SecAggPlusState()
        states[node].nid = node
        keys[str(node)] = list(theirs._setup(states[node], settings).values())
    inbox = []
    for node, state in states.items():
        dealt = theirs._share_keys(state, keys)
        inbox += [(node, c) for to, c in zip(dealt[Key.DESTINATION_LIST], dealt[Key.CIPHERTEXT_LIST], strict=True) if to == 1]
    came = {Key.SOURCE_LIST: [node for node, _ in inbox], Key.CIPHERTEXT_LIST: [c for _, c in inbox]}
    shape = layout(VALUES)
    one = update(shape)
    given = ndarrays_to_parameters([one.delta[at].reshape(s) for _, at, s in shape.slices()])
    sent: list[bytes] = []

    def step() -> None:
        sent[:] = theirs._collect_masked_vectors(states[1], came, one.weight, given)[Key.MASKED_PARAMETERS]

    seconds = median_s(step, repeats=3)
    return {"flower_s": seconds, "flower_upload_bytes": sum(map(len, sent)), "flower_peak_rss_mb": peak_bytes() / 1e6}


# --- the server -----------------------------------------------------------------------------------------------------


def server(n: int) -> dict[str, Any]:
    """Adds up sealed and masked updates one at a time, then takes the masks off. Every tenth site has dealt and dropped out."""
    began = time.perf_counter()
    session, profile, shape = Handshake.of(n), PROFILES["int8"], layout(VALUES)
    inboxes = {i: session.receive(i, relay(session.cohort, session.deals, i)) for i in session.deals}
    handshake = time.perf_counter() - began
    counted = [i for i in session.deals if i % 10]
    numbers = np.zeros(Numbers(len(shape.entries), COUNTERS).size, np.uint64)
    parts, adding, delivered = _sealed_parts(), 0.0, []
    before = peak_bytes()
    vector = np.zeros(shape.size, profile.word)
    for i, blob in _masked_updates(session, inboxes, counted, parts, numbers.size):
        began = time.perf_counter()
        reader = Reader(parts["open"](parse(blob, max_bytes=1 << 30)), "masked update")
        del blob
        read_session(reader, session.cohort.t1)
        signature, body = reader.take(SIGNATURE), reader.view(numbers.nbytes + packed_bytes(shape.size, profile.bits))
        one = Delivered(i, hashlib.sha256(body).digest(), signature)
        one.verify(session.cohort, session.publics.__getitem__)
        words = unpack(body[numbers.nbytes :], shape.size, profile.bits)
        assert words is not None, "this bench has packed it"
        np.add(vector, words, out=vector)
        np.add(numbers, np.frombuffer(body[: numbers.nbytes], "<u8"), out=numbers)
        delivered.append(one)
        del reader, body, words
        adding += time.perf_counter() - began
    holders = counted[: session.cohort.threshold]
    revealed = {h: reveal(session.cohort, inboxes[h], delivered) for h in holders}
    scales = scales_for(shape, profile, reach=5e-3)
    times = []
    for _ in range(3):
        began = time.perf_counter()
        shares = {h: parse_reveal(session.cohort, session.deals, counted, h, raw) for h, raw in revealed.items()}
        total, counts = vector.copy(), numbers.copy()
        unmask(session.cohort, session.deals, counted, shares, total, counts)
        unmasked = time.perf_counter()
        mean = sum_to_mean(total, shape, profile, scales, weight=len(counted), most=len(counted) * profile.levels)
        times.append((unmasked - began, time.perf_counter() - unmasked))
        right = bool(np.all(total == sum(counted)) and np.all(counts == sum(counted)) and np.isfinite(mean[0]))
        del total, mean
    if not right:
        raise SystemExit("the masks have not come off")
    dropped = n - len(counted)
    unmask_s, mean_s = (statistics.median(column) for column in zip(*times, strict=True))
    return {"values": shape.size, "dropped": dropped, "masks_taken_off": len(counted) * (1 + dropped), "unmask_s": unmask_s,
            "mean_s": mean_s, "add_s_per_site": adding / len(counted), "handshake_all_sites_s": handshake,
            "peak_rss_mb": peak_bytes() / 1e6, "vectors_at_peak": (peak_bytes() - before) / vector.nbytes}  # fmt: skip


def _masked_updates(
    session: Handshake, inboxes: Mapping[int, Inbox], counted: list[int], parts: Mapping[str, Any], numbers: int
) -> Iterator[tuple[int, bytes]]:
    """Each site's sealed masked update, made by a process of its own, for its memory not to count here."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "update"
        for i in counted:
            site = get_context("fork").Process(target=_write_update, args=(path, session, inboxes[i], i, parts, numbers))
            site.start()
            site.join()
            yield i, path.read_bytes()
            path.unlink()


def _write_update(path: Path, session: Handshake, inbox: Inbox, own: int, parts: Mapping[str, Any], numbers: int) -> None:
    """All its values are its number."""
    from fedlora.lab.testing import TOY_BASE, toy_adapter, toy_plan

    profile = PROFILES["int8"]
    vector, counts = np.full(layout(VALUES).size, own, profile.word), np.full(numbers, own, np.uint64)
    key = session.identities[session.cohort.advert(own).name].signing
    payload, _ = masked(session.cohort, own, session.secrets[own], inbox, vector, counts, bits=profile.bits, key=key)
    header = parts["header"](toy_plan().canonical(), TOY_BASE, toy_adapter())(payload)
    blob, _ = seal(payload, header=header, signer=parts["a"], recipients=[parts["b"].public], entropy=os.urandom)
    path.write_bytes(blob)


# --- a whole session ------------------------------------------------------------------------------------------------


def session(n: int) -> dict[str, Any]:
    """Offer to sum, in one process, without training: seconds and bytes of each step.

    The server's seconds of a step: opening its replies, and making and sealing the requests of the next one.
    """
    sys.path.insert(0, str(ROOT / "tests"))
    from protect.secagg.world import Heard, World, names

    from fedlora.lab.testing import toy_layout

    world, heard = World(n), Heard()
    site_s: dict[str, list[float]] = defaultdict(list)
    up, down = defaultdict(list), defaultdict(list)
    server_s: dict[str, float] = {}

    def answers(requests: Any) -> Iterator[Any]:
        for request in requests:
            began = time.perf_counter()
            reply = world.answer(request)
            site_s[request.phase].append(time.perf_counter() - began)
            up[request.phase].append(len(reply.body))
            down[request.phase].append(len(request.body))
            yield reply

    start = time.perf_counter()
    talk = world.server().collect(world.task(), names(n), heard)
    requests = next(talk)
    offer = time.perf_counter() - start
    while requests:
        phase, began = requests[0].phase, time.perf_counter()
        try:
            requests = talk.send(answers(requests))
        except StopIteration:
            requests = []
        server_s[phase] = time.perf_counter() - began - sum(site_s[phase])
    seconds = time.perf_counter() - start
    if len(heard.sums) != 1:
        raise SystemExit(f"no sum: {heard.codes()}")
    phases: list[dict[str, Any]] = [{"phase": p, "site_s": statistics.mean(site_s[p]), "server_s": server_s[p],
               "up_bytes": max(up[p]), "down_bytes": max(down[p])} for p in site_s]  # fmt: skip
    whole = {"up_bytes": sum(max(sizes) for phase, sizes in up.items() if phase != "mask"),
             "masked_update_besides_values_bytes": max(up["mask"]) - packed_bytes(toy_layout().size, 16),
             "down_bytes": sum(max(sizes) for sizes in down.values()), "site_s": sum(p["site_s"] for p in phases),
             "server_s": sum(server_s.values()) + offer, "one_process_s": seconds}  # fmt: skip
    return {"phases": phases, "whole": whole}


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["_site", name, peers]:
            result = site(name, int(peers))
        case ["_flower", peers]:
            result = flower(int(peers))
        case ["_server", sites]:
            result = server(int(sites))
        case ["_session", sites]:
            result = session(int(sites))
        case _:
            raise SystemExit("run it as: python simulations/bench.py secagg")
    print(json.dumps(result))
