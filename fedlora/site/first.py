"""The first adapter of a run at a site: from the public seed, or an earlier run's, which the site has itself."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedlora.core.adapter import Adapter, Layout
from fedlora.core.errors import FedLoRAError, PlanRefused
from fedlora.core.grids import to_bfloat16
from fedlora.core.plan import Plan, parse_plan
from fedlora.core.registry import MODES
from fedlora.formats.files import load_adapter, save_adapter, stated_facts
from fedlora.formats.state.journal import Journal
from fedlora.formats.state.memory import FileMemory
from fedlora.rules import rule_of
from fedlora.rules.first import first_adapter
from fedlora.site.policy import refused

Takes = Literal["known", "approved"]


@dataclass(frozen=True, slots=True)
class Firsts:
    """Where a site looks for the adapter of an earlier run with which a plan begins.

    What a server sends is compared with it, so that the adapter is never the server's word alone: a made-up one can make an
    update show more of single rows than one from the seed.

    Attributes:
        state: the site's state directory: ``journal/RUN.safetensors`` of runs that it took part in, and
            ``first/DIGEST.safetensors`` of what lay beside a plan that a person approved.
        takes: ``known``: the former only.
    """

    state: Path
    takes: Takes = "known"

    def of(self, plan: Plan, layout: Layout) -> Adapter:
        """The first adapter of a plan.

        Args:
            layout: of this base under the plan's LoRA settings.

        Raises:
            PlanRefused: the plan begins with an adapter that this site does not have, or not from a run of its own.
        """
        if not plan.lora.init:
            return first_adapter(layout, seed=plan.run.seed)
        self.check(plan)
        file = self._approved(plan) or self.run_of(plan) or self._copy(plan.lora.init)
        try:
            adapter = load_adapter(file)[0]
        except FedLoRAError as e:
            raise PlanRefused(
                f"the plan begins with adapter {plan.lora.init[:12]}, and the copy of it here cannot be read: {e}",
                hint="approve the plan again, from the whole directory that the coordinator sent",
            ) from None
        if adapter.digest() != plan.lora.init and (adapter := _rounded(adapter)).digest() != plan.lora.init:
            raise PlanRefused(
                f"the plan begins with adapter {plan.lora.init[:12]}, and {file} is another one",
                hint="delete that file, and approve the plan again, from the whole directory that the coordinator sent",
            )
        if adapter.layout != layout:
            raise PlanRefused(
                f"the plan begins with adapter {plan.lora.init[:12]}, whose layers or rank are not those of its own [lora]",
                hint="the coordinator pins it again with `fedlora pin --init`",
            )
        return adapter

    def check(self, plan: Plan) -> None:
        """Whether this site has the adapter that a plan begins with, from where its policy asks for.

        Raises:
            PlanRefused: it has not.
        """
        init = plan.lora.init
        if not init or self._approved(plan) is not None or self.run_of(plan) is not None:
            return
        if self.takes == "known":
            raise refused(
                "policy-init",
                f"the plan begins with adapter {init[:12]}, which came of no run in which this site has trained on this base",
            )
        if not self._copy(init).is_file():
            raise PlanRefused(
                f"the plan begins with adapter {init[:12]}, which is not here",
                hint="approve the plan again, from the whole directory that the coordinator sent: the adapter lies beside it",
            )

    def _approved(self, plan: Plan) -> Path | None:
        """What lay beside a plan that was approved, where the policy takes that. Looked for first: it costs no reading."""
        copy = self._copy(plan.lora.init)
        return copy if self.takes == "approved" and copy.is_file() else None

    def run_of(self, plan: Plan) -> Path | None:
        """The file of a run of this site that came to the adapter with which a plan begins, or to one that is this one rounded.

        What a site keeps when a run ends is what the server has sent. So it counts only of a run in which this site has trained,
        on the same base and with the same seed, by which rows are held out; and for a plan under which the server sees sums
        alone only of such a run, where what is sent is bounded by what sums can give.
        """
        journal = Journal(self.state / "journal", FileMemory(self.state / "memory"))  # which remembers runs that went
        files = sorted(journal.directory.glob("*.safetensors"))
        for digest in (_stated_digest, _rounded_digest):  # the second reads all values; only some rules end off the grid
            for file in files:
                with suppress(FedLoRAError):  # `fedlora site repair` names what is damaged
                    if digest(file) == plan.lora.init and _vouches(file, plan) and journal.trained(file.stem):
                        return file
        return None

    def keep(self, adapter: Adapter) -> None:
        """Keeps an adapter that lay beside a plan which a person approves."""
        if not (file := self._copy(adapter.digest())).is_file():
            save_adapter(file, adapter, {})

    def _copy(self, init: str) -> Path:
        return self.state / "first" / f"{init}.safetensors"


def begins(plan: Plan, firsts: Firsts) -> list[str]:
    """Whether the adapter with which a plan begins is known here."""
    if not plan.lora.init:
        return []
    if (of := firsts.run_of(plan)) is not None:
        return [f"it begins with the adapter of run {of.stem[:12]}, in which this site has trained"]
    return [
        "IT BEGINS WITH AN ADAPTER THAT CAME OF NO RUN OF THIS SITE: nothing here says what is in it, and a made-up one can make "
        "this site's updates show more of single rows than a new one. Ask those who took part for its digest"
    ]


def unknown_first(plan: Plan, firsts: Firsts) -> list[str]:
    """Why this site would refuse the adapter with which a plan begins; what lies beside an approved plan is kept with it."""
    if not plan.lora.init or firsts.takes == "approved" or firsts.run_of(plan) is not None:
        return []
    return ["the adapter with which it begins came of no run of this site, and policy.init is 'known'"]


def _rounded(adapter: Adapter) -> Adapter:
    """As a run begins with it."""
    return Adapter(to_bfloat16(adapter.vector), adapter.layout)


def _vouches(file: Path, plan: Plan) -> bool:
    """Whether the run that a file came of is one whose end this site may begin with under a plan."""
    stored = stated_facts(file).get("plan")  # once it is taken, it is read whole and its digest is checked
    earlier = parse_plan(stored.encode()) if isinstance(stored, str) else Plan()
    summed = MODES[plan.protect.mode].reveals == "sum"
    return (
        (earlier.model.digest, earlier.run.seed) == (plan.model.digest, plan.run.seed)
        and not (summed and MODES[earlier.protect.mode].reveals != "sum")
        and not rule_of(earlier).keeps_local_factor
    )


def _stated_digest(file: Path) -> str:
    return str(stated_facts(file).get("digest"))


def _rounded_digest(file: Path) -> str:
    return _rounded(load_adapter(file)[0]).digest()
