"""Each site's own adapter, as `fedlora personalize` makes it: from the federation's, chosen on the site's validation rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from fedlora.assemble import Lab
from fedlora.core.adapter import Adapter
from fedlora.core.errors import FedLoRAError, plain
from fedlora.core.events import Report
from fedlora.core.tables.personal import PERSONAL, Choice, Way
from fedlora.formats.files import save_adapter, write_atomic
from fedlora.formats.records import dump_text, parse_text
from fedlora.lab.arms import Alone, Cost, Trained

DIRECTORY = "personal"
"""In the directory of a seed: ``SITE.safetensors``, which `fedlora export` takes, and ``SITE.json``: the adapter of each
site that has validation rows, and how it was chosen."""


@dataclass(frozen=True, slots=True)
class Personal:
    """The arm of one site.

    Attributes:
        further: more steps on its own rows.
        alone: what it would have learned alone.
        federated: what the federation gave; asked when it is there.
    """

    site: str
    further: Alone
    alone: Alone
    federated: Callable[[], Trained]

    def train(self, lab: Lab, out: Path, report: Report) -> tuple[Adapter, Cost]:
        """Trains what is not there yet, and chooses; the global adapter where the site has no validation rows."""
        from fedlora.lab.rehearse import simulated_run
        from fedlora.learn.personal.search import choose, scorer

        given = self.federated()
        start = given if isinstance(given, Adapter) else given[self.site]
        rows = lab.rows[self.site]["validation"]
        if not rows:
            return start, Cost(tokens=0, steps=0, seconds=0.0, learning_rate=None)
        after, cost = self.further.train(lab, out, report, start)
        ends: dict[Way, Adapter] = {"further": after}
        own, alone = self.alone.train(lab, out, report)
        if own.layout == start.layout:  # a rule may end with another rank
            ends["alone"] = own
        prefer = lab.simulation.personal.prefer if lab.simulation.personal else "own"
        adapter, choice = choose(start, ends, rows, scorer(lab.lora, rows, lab.plan.training), prefer=prefer)
        facts = {"site": self.site, "run": simulated_run(lab.plan), "plan": lab.plan.canonical().decode(), PERSONAL: True}
        save_adapter(out / DIRECTORY / f"{self.site}.safetensors", adapter, facts)
        write_atomic(out / DIRECTORY / f"{self.site}.json", dump_text(choice), mode=0o644)
        steps = None if cost.steps is None or alone.steps is None else cost.steps + alone.steps
        return adapter, Cost(cost.tokens + alone.tokens, steps, cost.seconds + alone.seconds, cost.learning_rate)


def personal_arms(lab: Lab, federated: Callable[[], Trained]) -> Mapping[str, Personal]:
    """``personal:SITE`` for each site; nothing where the plan asks for none."""
    s, rounds = lab.simulation, lab.plan.federation.num_rounds
    if "personal" not in s.arms:
        return {}
    return {
        f"personal:{site}": Personal(
            site,
            Alone(f"personal:{site}", (site,), rounds, 1, s.personal),
            Alone(f"local:{site}", (site,), rounds, 1, s.local),
            federated,
        )
        for site in s.sites
    }


def choices_of(directory: Path) -> Iterator[str]:
    """What each site's own adapter is, in a sentence for each site of each seed."""
    seeds = sorted(directory.glob("seed-*"), key=lambda p: (len(p.name), p.name)) or [directory]
    for seed in seeds:
        for file in sorted((seed / DIRECTORY).glob("*.json")):
            named = f"personal:{plain(file.stem)}" + f", {seed.name}" * (len(seeds) > 1)
            try:
                choice = parse_text(Choice, file.read_bytes(), where=str(file), hint="delete it")
            except FedLoRAError as e:
                yield f"{named}: {e}"
            else:
                yield f"{named}: {choice.words()}"
