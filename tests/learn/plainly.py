"""Two rounds of a site for each of some plans, as JSON: ``python plainly.py SITE_FILE PLANS``. See test_plain.py."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def rounds(site_file: Path, plans: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Whether ``learn/fast`` is there, what each plan trained, and what is said of settings that need the folder."""
    from fedlora.core.errors import ConfigError
    from fedlora.core.plan import Plan
    from fedlora.learn.hooks import fast
    from fedlora.learn.local import load_learner

    def learner_of(file: Path, tables: Mapping[str, Any]) -> Any:
        return load_learner(file, Plan.model_validate_json(json.dumps(tables)), report=lambda *_: None)

    trained, refused = [], []
    for tables in plans:
        learner = learner_of(site_file, tables)
        adapter, state = learner.model.get(), b""
        learner.forecast()
        for number in (1, 2):
            done = learner.train(adapter, round=number, state=state)
            adapter, state = done.adapter, done.state
            facts = [adapter.digest(), dict(done.counters), dict(learner.evaluate(adapter))]
            trained.append([*facts, learner.model.base.model.is_gradient_checkpointing])
    for line in ("micro_batch_tokens = 64", "gpu_memory_gib = 1"):
        asking = site_file.with_name("asking.toml")
        asking.write_text(f"{line}\n{site_file.read_text()}")
        try:
            learner_of(asking, plans[-1])
        except ConfigError as e:
            refused.append(str(e))
    return {"fast": fast() is not None, "trained": trained, "refused": refused}


if __name__ == "__main__":
    print(json.dumps(rounds(Path(sys.argv[1]), json.loads(sys.argv[2]))))
