"""`fedlora docs`: the guides and sample files, as the installed version has them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import typer

from fedlora.cli.output import Json, emit

GUIDES: Final = {
    "readme": ("README.md", "what FedLoRA is, its limits, and the first commands of each user"),
    "site": ("client/README.md", "for a hospital or branch: what leaves, what the screen says, what to do then"),
    "coordinator": ("server/README.md", "the runbook of a server"),
    "security": ("server/SECURITY.md", "what each mode promises, and the attacks that were tried"),
    "privacy": ("server/PRIVACY.md", "differential privacy in plain words: what it promises, and what a site controls"),
    "faults": ("server/FAULTS.md", "the faults that were tried, and what is said of each"),
    "rules": ("server/RULES.md", "which aggregation rule when"),
    "methods": ("server/METHODS.md", "LoRA and the names around it: what is here, what is not, and why"),
    "researcher": ("simulations/README.md", "simulations, arms, data sets and numbers"),
    "example": ("fedlora/EXAMPLE.md", "a rule of your own, and a Trainer that you have, in a script"),
    "bases": ("fedlora/BASES.md", "families of base models: what works, what is refused and why"),
    "format": ("fedlora/FORMAT.md", "every byte and record that leaves a process"),
    "architecture": ("fedlora/ARCHITECTURE.md", "the flow, the layers and what always holds"),
    "decisions": ("fedlora/DECISIONS.md", "what was decided, when and why"),
    "changes": ("CHANGELOG.md", "what changed between versions"),
    "site.toml": ("client/site.toml", "a site file, every key with a comment"),
    "plan.toml": ("server/plan.toml", "a plan, every key with a comment"),
    "alerts.yml": ("server/alerts.yml", "rules for Prometheus: server down, site lost, round late, run failed"),
    "toy.toml": ("simulations/plans/toy.toml", "a simulation of a minute, with a base model and data of its own"),
    "service": ("client/fedlora-site.service", "a systemd unit for `fedlora site up`"),
}
"""A guide: where it stands in a checkout, and what it is about."""


def place(guide: str) -> Path:
    """The file of one of :data:`GUIDES`: inside the installed package, or in the checkout around it."""
    package = Path(__file__).parents[1]
    where = GUIDES[guide][0]
    installed = package.parent / where if where.startswith("fedlora/") else package / "guides" / where
    return installed if installed.is_file() else package.parent / where


def docs(
    guide: Annotated[str, typer.Argument(help="Which one to print; default: list all.", show_default=False)] = "",
    out: Annotated[Path | None, typer.Option(help="Write all of them below this directory.", show_default=False)] = None,
    json: Json = False,
) -> None:
    """Print a guide or a sample file, or write all of them to a directory.

    They are those of the installed version.

    Example: fedlora docs site | less

    Example: fedlora docs --out guides
    """
    import shutil

    from fedlora.answers import Guides
    from fedlora.core.errors import ConfigError

    if guide and guide not in GUIDES:
        raise ConfigError(f"there is no guide {guide[:80]!r}", hint=f"choose one of: {', '.join(GUIDES)}")
    if guide and out:
        raise ConfigError("one guide is printed, all are written: not both", hint=f"fedlora docs {guide} > FILE")
    if out is not None:
        taken = [where for where, _ in GUIDES.values() if (out / where).exists()]
        if taken:
            raise ConfigError(f"{out / taken[0]} is there already", hint="choose a new directory")
        for name, (where, _) in GUIDES.items():
            (out / where).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(place(name), out / where)
    text = place(guide).read_text("utf-8") if guide else None
    lines = [f"{name:13} {about}" for name, (_, about) in GUIDES.items()]
    if out is not None:
        lines = [f"wrote {len(GUIDES)} files below {out}"]
    said = lines if text is None else text.rstrip("\n").split("\n")
    emit(Guides(guides=list(GUIDES), text=text, out=str(out) if out else None), said, as_json=json)
