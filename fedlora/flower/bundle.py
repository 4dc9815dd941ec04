"""The bundle that Flower ships to sites: empty, the same bytes everywhere, and pinned by hash at both ends.

Flower sends code from the server to sites. In FedLoRA both ends run only what is installed there; the bundle just satisfies
Flower's file format. Run with stock Flower tools, its apps refuse to work.
"""

from __future__ import annotations

import hashlib
import io
import zipfile

BUNDLE_VERSION = "1.0.0"
"""Version of the bundle's own content, not of FedLoRA; it changes only if these bytes change."""

BUNDLE_SHA256 = "2f6df5af992ba205c6039cd5478f269f2b64e1bcf9f426030e513293204ffece"
"""SHA-256 of :func:`bundle_bytes`, hex. A site and the server's executor refuse every other bundle."""

_PYPROJECT = f"""\
[project]
name = "fedlora"
version = "{BUNDLE_VERSION}"
description = "Empty on purpose: both ends run their installed FedLoRA"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "fedlora"

[tool.flwr.app.components]
serverapp = "fedlora.flower.server_app:app"
clientapp = "fedlora.flower.client_app:app"

[tool.flwr.app.config]
job = ""
"""
_README = """\
# FedLoRA

This bundle holds no code and no data. A site runs the FedLoRA that is installed there and refuses any bundle but this one.
"""
_DATE = (2024, 10, 1, 0, 0, 0)


def bundle_bytes() -> bytes:
    """The bundle: a zip of pyproject.toml, README.md and Flower's table of their hashes.

    Stored, not deflated, because zlib's output differs between builds and the hash is pinned.
    """
    files = {"pyproject.toml": _PYPROJECT.encode(), "README.md": _README.encode()}
    rows = [f"{name},{hashlib.sha256(data).hexdigest()},{8 * len(data)}" for name, data in files.items()]
    files[".info/CONTENT"] = "\n".join(rows).encode()
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for name, data in files.items():
            entry = zipfile.ZipInfo(name, _DATE)
            entry.create_system = 3  # Unix, also where this runs on something else
            archive.writestr(entry, data)
    return out.getvalue()
