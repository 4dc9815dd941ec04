"""What a site that leaves for good deletes of itself."""

from __future__ import annotations

from pathlib import Path

from fedlora.core.errors import ConfigError
from fedlora.site.private import LEDGERS
from fedlora.site.site_file import SiteFile


def doomed(file: SiteFile, root: Path) -> list[Path]:
    """What goes when a site leaves for good: its two keys and its state directory, as far as they are there.

    Privacy ledgers stay: what was released about people stays released, whoever trains on their rows next.

    Args:
        root: the directory of the site file.

    Raises:
        ConfigError: the state directory holds what is never deleted: the site file, rows, a base model, or more keys.
    """
    state = (root / file.state).resolve()
    paths = [file.data.path, file.data.held_out_path, *file.models.values(), file.server_key, file.ca]
    kept = [root, *(root / one for path in paths for one in ([path] if isinstance(path, str) else path) if one)]
    if inside := [str(path) for path in kept if path.resolve().is_relative_to(state)]:
        raise ConfigError(
            f"{root / file.state}, the state directory, holds what is never deleted: {', '.join(inside)}",
            hint="move it, or delete by hand what you no longer want",
        )
    ledgers = root / file.state / LEDGERS
    gone = sorted(path for path in (root / file.state).iterdir() if path != ledgers) if ledgers.exists() else [root / file.state]
    return [path for path in (root / file.key, root / file.node_key, *gone) if path.exists()]
