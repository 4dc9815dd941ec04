"""The table ``[simulation]`` of a plan: which sites there are on this machine, with which rows, and what is compared."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Protocol, Self, TypeVar

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from fedlora.core.limits import MAX_SITES
from fedlora.core.section import Section, SiteName, worded
from fedlora.core.tables.data import SiteData


class Directory(Protocol):
    """A path, as far as this module asks: it touches no disk."""

    @property
    def name(self) -> str: ...
    @property
    def parent(self) -> Self: ...
    def __truediv__(self, name: str, /) -> Self: ...


P = TypeVar("P", bound=Directory)
_SPLITS = "a split is files, iid, dirichlet, or by: and the name of a column, as by:hospital"
_DEFAULT_SITES = ("site-1", "site-2", "site-3")
TOY_BASE = "fedlora/toy"
"""What the generated base is called wherever a model has a public name: an adapter of it is of no use with any other."""


def _names(said: Any) -> Any:
    """A number of sites becomes their names; a list a tuple, which strict validation asks for once it is no more JSON."""
    if isinstance(said, int) and not isinstance(said, bool):
        if not 1 <= said <= MAX_SITES:
            raise PydanticCustomError("sites", "{text}", {"text": f"a number of sites is 1 to {MAX_SITES}, this one {said}"})
        return tuple(f"site-{number:0{len(str(said))}}" for number in range(1, said + 1))
    return tuple(said) if isinstance(said, list) else said


def _table(said: Any) -> Any:
    """A path alone stands for a table with this path."""
    if isinstance(said, dict):
        return {key: tuple(value) if isinstance(value, list) else value for key, value in said.items()}
    return {"path": said} if isinstance(said, str) else said


ArmKind = Literal["base", "local", "federated", "pooled-steps", "pooled-tokens", "personal"]
"""Kinds of arms: ``local`` and ``personal`` are one for each site."""


class Arm(Section):
    """Settings of one arm of a comparison."""

    learning_rate: Annotated[float, Field(gt=0, le=1)]
    """peak learning rate, tuned for this arm on the validation split"""


class PersonalArm(Arm):
    """Settings of the arm `personal`."""

    prefer: Literal["own", "all"] = "own"
    """own: as good on its own rows as can be; all: as near to the federated adapter as is no worse there than alone"""


class Simulation(Section):
    """For `fedlora simulate` only: not part of the plan's digest, refused in a deployment."""

    sites: Annotated[tuple[SiteName, ...], BeforeValidator(_names)] = _DEFAULT_SITES
    """virtual sites: names, or how many; a name is the stem of the site's files; with by:COLUMN the values, [] for all"""
    split: Annotated[str, worded(r"^(files|iid|dirichlet|by:.+)$", _SPLITS)] = "files"
    """how sites get rows; files: each its own; iid, dirichlet, by:COLUMN: the rows of data.path are dealt to them by group"""
    split_label: str = ""
    """dirichlet: the column whose values differ between sites; empty: sites differ in their number of rows"""
    split_alpha: Annotated[float, Field(gt=0, le=1e6)] = 0.5
    """dirichlet: concentration; lower: sites differ more"""
    split_seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """draw of who has which rows, and which are held out; the same for all seeds of a comparison"""
    base: str = "toy"
    """directory or GGUF file of the base model, relative to the plan file; toy: a tiny random model"""
    keep_dequantized: bool = False
    """keep the dequantized 4-bit weights in memory: same bits, faster on a CPU, four times the memory"""
    arms: Annotated[tuple[ArmKind, ...], Field(min_length=1)] = (
        "base",
        "local",
        "federated",
        "pooled-steps",
        "pooled-tokens",
    )
    """what is compared, at equal tokens; personal: what each site makes of the federated adapter, with more steps of its own"""
    local: Arm | None = None
    """settings of the arm `local`: each site trains alone"""
    pooled_steps: Arm | None = None
    """settings of the arm `pooled-steps`: as many steps as one site, on batches as large as those of all sites together"""
    pooled_tokens: Arm | None = None
    """settings of the arm `pooled-tokens`: as many steps as all sites together"""
    personal: PersonalArm | None = None
    """settings of the arm `personal`: each site trains on from the federated adapter, as many steps as in the federation"""
    evaluate_on: Literal["validation", "test"] = "test"
    """split that the table of arms reports; tune on validation, read test once"""
    examples_per_site: Annotated[int, Field(ge=0)] = 0
    """evaluate on the first n examples of each site's split; 0: all"""
    data: Annotated[SiteData, BeforeValidator(_table)] = SiteData(path="toy")
    """the rows; path: a directory with SITE.csv, or SITE.train.csv and SITE.test.csv; with a split, any files; toy: generated"""

    @property
    def column(self) -> str:
        """The column by which rows are dealt; empty: none."""
        return self.split[3:] if self.split.startswith("by:") else self.split_label

    @model_validator(mode="after")
    def _rows_fit(self) -> Self:
        if self.split.startswith("by:") and "sites" not in self.model_fields_set:
            object.__setattr__(self, "sites", ())  # the column says them
        elif not self.sites and not self.split.startswith("by:"):
            raise PydanticCustomError("sites", "sites is empty: name them, or say how many")
        if len(set(self.sites)) < len(self.sites):
            raise PydanticCustomError("sites", "a site is named twice in sites")
        if self.split_label and self.split != "dirichlet":
            raise PydanticCustomError("label", "split_label belongs to split = 'dirichlet'; by:COLUMN names its own column")
        if "personal" in self.arms and "federated" not in self.arms:
            raise PydanticCustomError("arms", "the arm personal begins with what the arm federated gives: name both in arms")
        if "personal" in self.arms and self.evaluate_on == "validation":
            raise PydanticCustomError(
                "arms", "the arm personal chooses on validation rows, so that its score needs evaluate_on = 'test'"
            )
        if self.data.held_out_path:
            raise PydanticCustomError(
                "held_out", "data.held_out_path is of site files: here SITE.test files say it, or data.held_out_fraction"
            )
        return self


def is_toy(table: Simulation | None) -> bool:
    """Whether the base is the generated one."""
    return table is not None and table.base == "toy"


def made_beside(out: P) -> P:
    """Where a generated base and generated rows lie: beside the results, and not in those of a run that is itself called toy."""
    return out.parent / ("toy" if out.name != "toy" else "toy.made")
