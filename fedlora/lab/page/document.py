"""One page that loads nothing and runs nothing: sections of figures and tables for ``page.html.j2``."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from fedlora.core.errors import plain
from fedlora.formats.files import write_atomic
from fedlora.lab.page.figures import COLORS, Figure, Table


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page: figures, then tables, then paragraphs. Those that are None are left out."""

    title: str
    figures: Sequence[Figure | None] = ()
    tables: Sequence[Table] = ()
    notes: Sequence[str] = ()

    def shown(self) -> Section | None:
        """Without what is empty; None if nothing is left."""
        figures, tables = [f for f in self.figures if f], [t for t in self.tables if t.rows]
        return Section(self.title, figures, tables, self.notes) if figures or tables or self.notes else None


def document(title: str, sections: Sequence[Section], **more: Any) -> str:
    """A page that loads nothing and runs nothing.

    Args:
        more: what ``simulation.contents`` gives besides; each may be missing.
    """
    environment = Environment(
        loader=FunctionLoader(lambda name: files(__package__).joinpath(name).read_text("utf-8")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: value if isinstance(value, Markup) else plain(value),
    )
    environment.filters["digest"] = lambda text: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    empty = {
        "heading": "",
        "lead": "",
        "honest": "",
        "tiles": (),
        "seeds": (),
        "facts": {},
        "command": "",
        "goes_on": False,
        "now": "",
    }
    shown = [s for section in sections if (s := section.shown())]
    return environment.get_template("page.html.j2").render({**empty, **more, "title": title, "sections": shown, "colors": COLORS})


def write_page(shown: Mapping[str, Any], page: Path, *, mode: int = 0o644) -> None:
    """Writes what :func:`document` takes; several processes may write the same page.

    Raises:
        StoreError, ResourceError: the file cannot be written.
    """
    write_atomic(page, document(**shown).encode("utf-8", "replace"), mode=mode, shared=True)


def write_figures(shown: Mapping[str, Any], directory: Path | None) -> list[Path]:
    """Writes each figure of a page as PDF and as PNG, for papers; returns the files.

    Args:
        directory: None: none is written.

    Raises:
        StoreError, ResourceError: a file cannot be written.
    """
    sections = [*shown["sections"], *(s for part in shown.get("seeds", ()) for s in part["sections"])]
    found = [figure for section in sections for figure in section.figures if figure]
    return [file for figure in found for file in figure.save(directory)] if directory is not None else []


def made_with(environment: Mapping[str, Any]) -> list[str]:
    """Day, version and commit, as far as they are known."""
    day, version, commit = (plain(str(environment.get(k, ""))) for k in ("date", "fedlora", "commit"))
    return [day] * bool(day) + [f"FedLoRA {version}" + f", commit {commit}" * bool(commit)] * bool(version)
