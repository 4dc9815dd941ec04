"""What can be measured where the canaries of all sites are at hand: membership, exposure, extraction of their secrets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, TypeAlias

import numpy as np

from fedlora.core.adapter import Adapter
from fedlora.core.plan import Plan
from fedlora.core.tables.audit import Audit
from fedlora.core.tables.audited import MeasuredStratum
from fedlora.data import IGNORE, Tokens
from fedlora.learn.audit.extraction import greedy
from fedlora.learn.audit.planted import examples_of
from fedlora.learn.audit.scores import base_of, losses, scores
from fedlora.learn.lora import LoraModel
from fedlora.privacy.audit import chance_exposure, exposure, membership
from fedlora.privacy.planted import Canary, fillers

CANDIDATES: Final = 256
"""Secrets among which a canary's is ranked: exposure goes up to 8 bits. More cost more losses; the gate asks for 3 bits."""
TRIED: Final = 32
"""Canaries of a stratum whose exposure is computed and whose secret is asked for."""

Sown: TypeAlias = tuple[bytes, Canary]
"""A canary and the seed that it is from."""


def measure(
    model: LoraModel, adapter: Adapter, sown: Sequence[Sown], plan: Plan, audit: Audit, *, rows: int
) -> list[MeasuredStratum]:
    """Attacks on the canaries of several sites, for each number of repeats.

    Args:
        sown: all canaries of all sites, those that are out as well.
        rows: computed at once, at most.
    """
    found = []
    for repeats in audit.repeats:
        of = [one for one in sown if one[1].repeats == repeats]
        inside = [one for one in of if one[1].inside]
        if not inside or len(inside) == len(of):
            continue
        found.append(_stratum(model, adapter, of, inside, plan, audit, rows=rows))
    return found


def _stratum(
    model: LoraModel, adapter: Adapter, of: Sequence[Sown], inside: Sequence[Sown], plan: Plan, audit: Audit, *, rows: int
) -> MeasuredStratum:
    length = plan.training.max_length
    examples = examples_of([c for _, c in of], tokenizer=model.tokenizer, plan=plan)
    each = scores(model, adapter, examples, score=audit.score, max_length=length, rows=rows)
    coins = np.array([c.inside for _, c in of])
    attack = membership(each[coins], each[~coins])
    tried = inside[:TRIED]
    bits = [_exposure(model, adapter, seed, canary, plan, rows=rows) for seed, canary in tried]
    asked = examples_of([c for _, c in tried], tokenizer=model.tokenizer, plan=plan)
    return MeasuredStratum(
        repeats=of[0][1].repeats,
        members=attack.members,
        others=attack.others,
        auc=attack.auc,
        tpr_1=attack.tpr_1,
        tpr_01=attack.tpr_01,
        exposure=float(np.mean(bits)),
        chance=chance_exposure(CANDIDATES),
        candidates=CANDIDATES,
        tried=len(tried),
        extracted=_extracted(model, adapter, asked),
        extracted_base=_extracted(model, base_of(adapter), asked),
    )


def _exposure(model: LoraModel, adapter: Adapter, seed: bytes, canary: Canary, plan: Plan, *, rows: int) -> float:
    """Bits by which a canary's secret is ranked before others behind the same prompt, by the likelihood of the whole text."""
    secrets = [canary.secret, *fillers(seed, canary.number, CANDIDATES - 1)]
    examples = examples_of([canary] * CANDIDATES, tokenizer=model.tokenizer, plan=plan, secrets=secrets)
    means = losses(model, adapter, examples, max_length=plan.training.max_length, rows=rows)
    whole = means * np.array([example.supervised for example in examples])
    return exposure(float(whole[0]), whole[1:])


def _extracted(model: LoraModel, adapter: Adapter, examples: Sequence[Tokens]) -> int:
    """Of how many examples the model says every token of the answer, but the one that ends it."""
    model.set(adapter)
    found = 0
    for example in examples:
        first = int(np.flatnonzero(example.labels != IGNORE)[0])
        rest = [int(token) for token in example.input_ids[first:-1]]
        found += greedy(model, [int(t) for t in example.input_ids[:first]], tokens=len(rest)) == rest
    return found
