"""A site that a coordinator has taken off and invites again: what belongs to its old keys makes room for new ones."""

from __future__ import annotations

import stat
from pathlib import Path

import tomlkit

from fedlora.core.errors import ConfigError
from fedlora.formats.files import write_atomic
from fedlora.formats.state.lock import holder
from fedlora.gateway.entry.stage import set_aside
from fedlora.site.foresight import ledger_of
from fedlora.site.leaving import doomed
from fedlora.site.private import LEDGERS
from fedlora.site.site_file import SiteFile, load_site_file


def begin_anew(site_file: Path, keys: Path) -> list[Path]:
    """Sets aside keys that a server has removed for good, and the state that is signed and encrypted with them; takes back the
    approvals of plans, which would allow the same runs a second time. All else in the site file stays.

    Returns:
        Where it lies now.

    Raises:
        ConfigError: a `site up` works there, or the state is a record of what was released, which new keys cannot continue.
        StoreError, KeyFileError: what this site has given cannot be read.
    """
    if not site_file.exists():
        return set_aside(keys, why="removed")
    file, root = load_site_file(site_file), site_file.resolve().parent
    state = root / file.state
    if state.exists():
        _check_state(file, root, state)
    moved = set_aside(keys, state, why="removed")
    if file.plans or file.uncovers:
        doc = tomlkit.parse(site_file.read_text("utf-8"))
        for key in {"plans", "uncovers"} & set(doc):
            doc[key] = [] if key == "plans" else {}
        target = site_file.resolve()
        write_atomic(target, tomlkit.dumps(doc).encode(), mode=stat.S_IMODE(target.stat().st_mode), shared=True)
    return moved


def _check_state(file: SiteFile, root: Path, state: Path) -> None:
    doomed(file, root)  # says so if the site file, rows or other keys lie in it
    if (by := holder(state)) is not None:
        raise ConfigError(f"{by} works with keys that the server has removed", hint="stop it, then join again")
    given = ledger_of(file, root)
    if (state / LEDGERS).exists() or given.contributions or given.alone:
        raise ConfigError(
            f"{state} is the record of what this site has released, and is bound to keys that the server has removed",
            hint="join in another directory (--out), and keep this one: a new record begins with nothing released, so count what "
            "was released here when you set budgets and approve plans there",
        )
