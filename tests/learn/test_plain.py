"""``fedlora/learn/fast`` can be deleted: training on a CPU goes on by the plain code, with the same bits."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from learn.plainly import rounds

pytestmark = pytest.mark.torch
ROOT = Path(__file__).resolve().parents[2]
ASKING = ("test_base", "test_learner", "test_loop", "test_lora", "test_rules")
"""The tests of what looks for ``learn/fast``, and does something else without it."""

OTHERS = ("test_arithmetic", "test_clipped", "test_evaluate", "test_forward", "test_private")
"""What does not look for it: in all other runs of these tests it is the same code."""

SMALL = {"training": {"max_length": 64, "per_device_train_batch_size": 4}, "federation": {"local_steps": 2, "num_rounds": 2}}
PLAIN = {**SMALL, "model": {"dtype": "float32", "load_in_4bit": False}}
AGAIN = {**SMALL["training"], "gradient_checkpointing": True, "optimizer_state": "keep"}
PLANS = (SMALL, PLAIN, {**PLAIN, "training": AGAIN})


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree without the folder."""
    tree = tmp_path_factory.mktemp("bare")
    junk = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "fedlora", tree / "fedlora", ignore=junk)
    shutil.copytree(ROOT / "tests", tree / "tests", ignore=junk)
    shutil.copy(ROOT / "pyproject.toml", tree)
    shutil.rmtree(tree / "fedlora" / "learn" / "fast")
    (tree / "fedlora" / "learn" / "fast" / "__pycache__").mkdir(parents=True)  # as `git rm` leaves it
    return tree


def run(tree: Path, *argv: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    done = subprocess.run([sys.executable, *argv], cwd=tree, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


ONE = """
def pytest_collection_modifyitems(config, items):
    seen = set()
    items[:] = [item for item in items if item.obj not in seen and not seen.add(item.obj)]
"""
"""A plugin of pytest: the first case of each test."""


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("names", "every"),
    [
        pytest.param(ASKING, False, id="asking"),
        pytest.param(ASKING, True, id="every case", marks=pytest.mark.long),
        pytest.param(OTHERS, True, id="others", marks=pytest.mark.long),
    ],
)
def test_the_tests_of_training_pass_without_the_folder(bare: Path, names: tuple[str, ...], every: bool):
    """In `make test` one case of each: the bits themselves are compared below."""
    (bare / "one.py").write_text(ONE)
    files = [f"tests/learn/{name}.py" for name in names]
    less = [] if every else ["-p", "one"]
    out = run(bare, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *less, "-m", "not long and not mutant", *files)
    assert " passed" in out


def test_training_gives_the_same_bits_without_the_folder_and_nothing_that_is_asked_for_is_left_out(
    bare: Path, toy: Path, tmp_path: Path
):
    rows = [{"prompt": f"{'apple ' * (1 + i % 5)}{i} is", "completion": f" {'red' if i % 2 else 'green'}"} for i in range(24)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    site = tmp_path / "site.toml"
    site.write_text(
        f'name = "a"\ndevice = "cpu"\nthreads = 1\nmodels = {{ "HuggingFaceTB/SmolLM2-135M-Instruct" = "{toy}" }}\n'
        '[data]\npath = "rows.jsonl"\n'
    )
    here = json.loads(json.dumps(rounds(site, PLANS)))
    there = json.loads(run(bare, "tests/learn/plainly.py", str(site), json.dumps(PLANS)))
    assert (here["fast"], there["fast"]) == (True, False)
    assert here["trained"] == there["trained"]
    assert (
        len({digest for digest, *_ in here["trained"]}) == 5
    )  # computing again gives the bits that were kept, in its first round
    assert [checkpointing for *_, checkpointing in there["trained"]] == [False] * 4 + [True] * 2
    assert here["refused"] == []
    assert len(there["refused"]) == 2
    assert all("need fedlora.learn.fast" in said for said in there["refused"])
