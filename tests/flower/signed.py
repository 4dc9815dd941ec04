"""Calls as a site's SuperNode makes them, and as others would like to."""

from __future__ import annotations

import os
from base64 import b64encode
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedlora.gateway.calls import CALL, KEY, TIME, sign_call
from fedlora.gateway.certificates import make_node_key


class Node:
    """A node key, enrolled in ``home`` under its name."""

    def __init__(self, root: Path, name: str, *, home: Path | None) -> None:
        line = make_node_key(root / f"{name}.key")
        key = serialization.load_ssh_private_key((root / f"{name}.key").read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        self.key, self.line = key, line
        if home is not None:
            (home / "sites" / f"{name}.pub").write_text(f"identity of {name}\n{line}\n")

    def headers(
        self, path: str, body: bytes = b"", *, method: str = "POST", late_s: float = 0.0, nonce: bytes | None = None
    ) -> dict[str, str]:
        """What Flower sends with a call, and the header of ours."""
        stamp = (datetime.now(UTC) - timedelta(seconds=late_s)).isoformat()
        pem = self.key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        flower = self.key.sign(stamp.encode(), ec.ECDSA(hashes.SHA256()))
        once = os.urandom(16) if nonce is None else nonce
        return {
            KEY: b64encode(pem).decode(),
            TIME: stamp,
            "flwr-signature": b64encode(flower).decode(),
            CALL: sign_call(self.key, method, path, body=body, stamp=stamp, nonce=once),
            "content-type": "application/protobuf",
        }
