"""What an answer of a site means to its coordinator, and the way out: the same words in `server status` and in a run's error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from fedlora.core.codes import REFUSES, policy_key

CURES: Final[Mapping[str, tuple[str, str]]] = {
    "plan-not-approved": ("nobody at the site has approved this plan", "it runs `fedlora site approve PLAN`"),
    "run-not-approved": ("the site has approved one run of this plan only", "it runs `fedlora site approve --again`"),
    "plan-refused": ("it refuses this plan", "its log says why"),
    **{
        code: (f"its {policy_key(code)} does not allow the plan's {key}", "change one of the two")
        for code, key in REFUSES.items()
    },
    "lone-change": (
        "on this base model it has given to other sums, or worked for updates that the server could read, as in a sealed run: "
        "with this one, single updates could show",
        'take another base model, or each site agrees by `fedlora site approve --uncovers`; server/README.md, "One plan on one '
        'base model", says what that gives up',
    ),
    "budget": (
        "its privacy budget allows no more releases",
        "fewer rounds or more noise in the plan, or a larger budget there",
    ),
    "version-unsupported": ("its FedLoRA does not know this plan's version", "the same version at both ends"),
    "wrong-base": ("its base model has other contents", "compare the digest of `fedlora pin` with the site's"),
    "model": ("its base model cannot be loaded", "it runs `fedlora check PLAN --site SITE`"),
    "data": ("its data cannot be used", "it runs `fedlora check PLAN --site SITE`"),
    "resources": ("its memory or disk is full", "it runs `fedlora check PLAN --site SITE`"),
    "roster-invalid": ("it has approved another roster, or none", "compare digests by telephone"),
    "late": ("it gave no answer before the deadline", "it is asked again in the next round"),
    "site-process": ("its own process does not run, or died", "ask whether `fedlora site up` runs there"),
    "node-unavailable": ("its connection was lost", "nothing if it comes back within ten minutes"),
    "quorum": ("too few sites", ""),
}
"""Code with which a site answered -> what that site lacks, and the way out."""

GOES_ON: Final = ("late", "node-unavailable", "offline", "not-drawn", "quorum")
"""What is over when the site is back: nothing else has to be done."""

FOR_PEOPLE: Final = frozenset(CURES.keys() - {*GOES_ON, "site-process"})
"""Answers that stay the same until somebody at the site acts, and may be others then, while the run waits."""
