"""Checks of a site's files before it connects: keys belong together, bases and data exist.

Cheap enough for every minute: they read the first row of each data file, and the file names of each base.
"""

from __future__ import annotations

from pathlib import Path

from fedlora.core.errors import KeyFileError, ModelError
from fedlora.data.conversations import first_rows
from fedlora.gateway.certificates import node_key_pem, node_key_public
from fedlora.site.site_file import SiteFile

_WEIGHTS = ("*.safetensors", "*.gguf")


def check_keys(file: SiteFile, root: Path) -> bytes:
    """Checks that the connection's files exist, and that the node key is this site's own.

    Returns:
        The public node key, PEM.

    Raises:
        KeyFileError: one is missing, unusable or of another site.
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
    """Checks that every base model in the site file exists.

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
    """Checks that the data files can be read and have a row; of many files, only the first ones.

    Raises:
        DataError: one has none, or cannot be read.
    """
    data = file.data
    for path in (*data.paths(root), *data.held_out_paths(root)):
        first_rows(path, format=data.format, encoding=data.encoding)
