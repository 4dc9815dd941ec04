"""As `fedlora simulate`; `run.py demo` (`demo-secagg`, `demo-dp`, `bank`) prepares that task first and shows what it brought."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
DEMOS = {
    "demo": ("icd10cm", "clinical"),
    "demo-secagg": ("icd10cm", "clinical-secagg"),
    "demo-dp": ("icd10cm", "clinical-dp"),
    "bank": ("naics", "bank"),
}  # word -> data set, plan


def main() -> int:
    word, options = "".join(sys.argv[1:2]), sys.argv[2:]
    if word in DEMOS:
        dataset, plan = DEMOS[word]
        parser = argparse.ArgumentParser(
            prog=f"run.py {word}", description=f"The demo of plans/{plan}.toml, from data to answers."
        )
        parser.add_argument("--resume", action="store_true", help="go on with a run that was cut off")
        resume = parser.parse_args(options).resume
        sys.path.insert(0, str(HERE))
        from demo import demo

        return demo(HERE.parent, dataset=dataset, plan=plan, resume=resume)
    from fedlora.cli import main as fedlora

    return fedlora(["simulate", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
