"""What a site can find out about its own files before it goes on line: keys that belong together, bases and data that are there.

Cheap enough for every minute: of each data file the first row, of each base the names of its files.
"""

from __future__ import annotations

from pathlib import Path

from fedlora.core.errors import KeyFileError, ModelError
from fedlora.data.conversations import first_rows
from fedlora.gateway.certificates import node_key_pem, node_key_public
from fedlora.site.site_file import SiteFile

_WEIGHTS = ("*.safetensors", "*.gguf")


def check_keys(file: SiteFile, root: Path) -> bytes:
    """The connection's files are there, and the node key is this site's own.

    Returns:
        The public node key, PEM.

    Raises:
        KeyFileError: one is missing or unusable, or another site's.
    """
    for path in (root / file.ca, root / file.node_key):
        if not path.is_file():
            raise KeyFileError(
                f"{path} is missing",
                hint="create keys with `fedlora keygen site`; the coordinator sends ca.crt and server.pub: put all together",
            )
    pem = node_key_public(root / file.node_key)
    public = (root / file.key).with_name(f"{file.name}.pub")
    if public.is_file():
        lines = public.read_text(encoding="utf-8", errors="replace").splitlines()
        if len(lines) > 1 and node_key_pem(lines[1]) != pem:
            raise KeyFileError(
                f"{file.node_key} is not the node key of {file.name}: {public.name} names another one",
                hint="set node_key in the site file to the key that was made together with `key`",
            )
    return pem


def check_bases(file: SiteFile, root: Path) -> None:
    """Every base model that the site file names is there.

    Raises:
        ModelError: one is not.
    """
    for name, where in file.models.items():
        path = root / where
        if path.is_file() and path.suffix == ".gguf":
            continue
        try:
            whole = (path / "config.json").is_file() and any(True for kind in _WEIGHTS for _ in path.glob(kind))
        except OSError:
            whole = False
        if not whole:
            what = "holds no config.json with weights (safetensors)" if path.is_dir() else "is not there"
            raise ModelError(f"the base {name}: {path} {what}", hint="correct [models] in the site file, or copy the base there")


def check_data(file: SiteFile, root: Path) -> None:
    """The data files can be read, and have a row. Of many files the first ones are looked at.

    Raises:
        DataError: one has none, or cannot be read.
    """
    data = file.data
    for path in (*data.paths(root), *data.held_out_paths(root)):
        first_rows(path, format=data.format, encoding=data.encoding)
