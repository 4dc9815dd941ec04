"""The codes of errors: one closed set, each with its exit status; what operators and the other end see does not change."""

import ast
import re
from pathlib import Path
from typing import get_args

import pytest

from fedlora.cli.explain import MEANINGS
from fedlora.core import codes, errors
from fedlora.core.errors import FedLoRAError
from fedlora.core.plan import Plan
from fedlora.core.toml import sample
from fedlora.site.policy import Policy

ROOT = Path(__file__).resolve().parents[1]
BEFORE = {
    1: "bad-dealer bad-share bad-signature both-secrets cannot-open cohort-too-small complaint-unanswered dropped-out envelope "
    "equivocation error internal lone-change malformed-header non-finite oversized payload-mismatch remote replayed run-failed "
    "secrets-gone session session-spent stopped suite-downgrade trailing-bytes truncated update-rejected votes-missing "
    "weight-too-large wire wrong-context wrong-direction wrong-federation wrong-global wrong-layout wrong-plan wrong-recipient "
    "wrong-round wrong-run",
    3: "config data held key-file local-port model not-installed state-lost store",
    4: "connection exposed revoked-site roster-expired roster-invalid roster-rollback unknown-site wrong-secret",
    5: "audit budget impossible-adapter plan-not-approved plan-refused policy-allowed-models policy-init policy-lone-change "
    "policy-max-canary-share "
    "policy-max-first-range "
    "policy-max-local-steps policy-max-rounds policy-max-update-bytes policy-min-sites policy-protect policy-share "
    "run-not-approved sits-out version-unsupported wrong-base",
    6: "quorum",
    7: "resources",
}
"""As each stood at a class of its own; ``internal`` is what a server says of a defect."""


def test_every_code_has_the_exit_status_that_it_had():
    assert {c: codes.exit_status(c) for c in codes.CODES} == {c: s for s, names in BEFORE.items() for c in names.split()}


def sources():
    return [p for p in (ROOT / "fedlora").rglob("*.py") if p.name != "codes.py"]


def test_no_code_is_dead():
    """Each is raised or compared somewhere: as the code of a class, or given at the raise."""
    said = set()
    for path in sources():
        said |= {n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)}
    assert codes.CODES - said == set()


def test_each_key_of_the_policy_that_can_refuse_a_plan_has_a_code_that_names_the_key_at_both_ends():
    """What leaves is a name of this closed set: no value of the policy, nothing of rows."""
    assert list(codes.REFUSES) == list(get_args(codes.Policy))
    own = {key for key, info in Plan.model_fields.items() if info.annotation is not None}
    for code, key in codes.REFUSES.items():
        table, *rest = key.split(".")
        assert table in own, key
        assert rest[-1] in sample(Plan), key
        assert codes.policy_key(code) in "\n".join(MEANINGS[code])
    otherwise = {
        "approve": "it is asked before any key: plan-not-approved, run-not-approved",
        "max_request_bytes": "what is longer is refused by its length, before it is a plan: oversized",
        "hours": "outside them the site is not on-line",
        "min_cell": "it refuses no plan: counts leave as zeros",
    }
    assert {
        codes.policy_key(code).removeprefix("policy.") for code in codes.REFUSES
    } | otherwise.keys() == Policy.model_fields.keys()


def test_every_code_in_the_tables_of_refusals_is_one_of_the_set():
    text = (ROOT / "fedlora" / "FORMAT.md").read_text()
    tables = [t.group() for t in re.finditer(r"^\| condition \| code \|\n(\|.*\n)+", text, re.M)]
    rows = [code for t in tables for code in re.findall(r"^\|.*\| `([a-z]+(?:-[a-z]+)*)` \|$", t, re.M)]
    assert len(rows) > 60
    assert set(rows) - codes.CODES == set()


def test_a_code_that_is_none_cannot_be_raised_or_declared():
    with pytest.raises(ValueError, match="no-such-code"):
        FedLoRAError("x", code="no-such-code")
    with pytest.raises(ValueError, match="no-such-code"):
        type("Wrong", (FedLoRAError,), {"code": "no-such-code"})


def test_a_code_given_at_the_raise_is_the_errors_own_and_its_status_follows():
    error = errors.WrongContext("text", hint="way", code="wrong-base")
    assert (error.code, error.exit_status, str(error), error.hint) == ("wrong-base", 5, "text", "way")
    assert errors.WrongContext.code == "wrong-context"


def test_every_class_is_told_apart_somewhere_or_is_the_word_for_many_raises():
    """A class of which nobody ever asks whether an error is one, and that is raised in a few places only, is a code."""
    classes = {name: c for name, c in vars(errors).items() if isinstance(c, type) and issubclass(c, FedLoRAError)}
    asked, raised = set(), dict.fromkeys(classes, 0)
    for path in [*sources(), *(ROOT / "simulations").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ExceptHandler) and node.type is not None:
                asked |= {n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)}
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                if node.func.id in ("isinstance", "suppress"):
                    asked |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
                raised[node.func.id] = raised.get(node.func.id, 0) + 1
    alone = {n for n in classes if n not in asked and raised[n] < 5 and not classes[n].__subclasses__()}
    assert alone == set()
