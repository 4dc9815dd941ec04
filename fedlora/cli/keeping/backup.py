"""`fedlora server backup` and `fedlora server restore`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedlora.cli.output import Json, emit

Home = Annotated[Path, typer.Argument(help="The server's directory, from `fedlora server init`.", show_default=False)]


def backup(
    home: Home,
    file: Annotated[Path, typer.Argument(help="File to write, outside that directory; it must not exist.", show_default=False)],
    json: Json = False,
) -> None:
    """Write the server's directory into one file, whole or not at all.

    It holds the server's private keys: keep it as those. The key of a run is not in it. A run that goes on has to be paused or
    stopped first; the server may be up.

    Example: fedlora server backup study /mnt/safe/study.tar
    """
    from fedlora.core.words import size
    from fedlora.flower.coordinator.backup import backup as library

    done = library(home, file)
    lines = [
        f"{done['file']}: {done['files']} files, {size(done['size_bytes'])}; digest {done['digest']}",
        "it holds the server's private keys: whoever reads it can sign as this server",
    ]
    if done["open"]:
        lines.append(f"not over yet: {', '.join(done['open'])}; make another backup when a round more is done")
    emit(done, [*lines, f"back: `fedlora server restore {file} NEW_DIRECTORY`"], as_json=json)


def restore(
    file: Annotated[Path, typer.Argument(help="File that `fedlora server backup` has written.", show_default=False)],
    home: Annotated[Path, typer.Argument(help="Directory of the server; it must not exist, or be empty.", show_default=False)],
    json: Json = False,
) -> None:
    """Make a server's directory of a backup, whole or not at all.

    Every file is compared with the backup's manifest before anything is in its place. It says what the age of the backup costs.
    Never let two servers run from one backup: sites would see two with one key.

    Example: fedlora server restore /mnt/safe/study.tar study
    """
    from fedlora.flower.coordinator.backup import restore as library
    from fedlora.flower.coordinator.backup import restored_lines

    done = library(file, home)
    emit(done, restored_lines(done), as_json=json)
