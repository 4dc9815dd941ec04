"""Calls as a site's SuperNode makes them, and as others would like to."""

from __future__ import annotations

import os
from base64 import b64encode
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.proto import fleet_pb2, message_pb2, node_pb2, recorddict_pb2

from fedlora.gateway.calls import CALL, KEY, TIME, sign_call
from fedlora.gateway.certificates import authority_digest, make_node_key


def pulled() -> bytes:
    """An answer to a pull, with a request."""
    found = fleet_pb2.PullMessagesResponse()
    found.messages_list.add().CopyFrom(announcement().messages_list[0])
    return found.SerializeToString()


def announcement(*, node: int = 7, parts: int = 5, run_id: int = 1, reply_to: str = "b" * 64) -> fleet_pb2.PushMessagesRequest:
    """A reply of so many parts as Flower announces it: four in each other, chunks in the last."""
    root = tree = message_pb2.ObjectTree(object_id=os.urandom(32).hex())
    for number in range(1, parts):
        child = tree.children.add(object_id=os.urandom(32).hex())
        tree = child if number < 4 else tree
    metadata = message_pb2.Metadata(
        run_id=run_id,
        message_id=root.object_id,
        src_node_id=node,
        dst_node_id=1,
        reply_to_message_id=reply_to,
        ttl=20.0,
        message_type="train.fedlora",
        created_at=datetime.now(UTC).timestamp(),
    )
    return fleet_pb2.PushMessagesRequest(
        node=node_pb2.Node(node_id=node),
        messages_list=[message_pb2.Message(metadata=metadata, content=recorddict_pb2.RecordDict())],
        message_object_trees=[root],
        clientapp_runtime_list=[1.0],
    )


AUTHORITY = "a" * 64
"""Of a federation without TLS."""


class Node:
    """A node key, enrolled in ``home`` under its name, which signs for the authority of ``home`` or of ``AUTHORITY``."""

    def __init__(self, root: Path, name: str, *, home: Path | None, enroll: bool = True) -> None:
        if not (root / f"{name}.key").exists():
            make_node_key(root / f"{name}.key")
        key = serialization.load_ssh_private_key((root / f"{name}.key").read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        self.key, ca = key, (home or root) / "tls" / "ca.crt"
        self.authority = authority_digest(ca) if ca.exists() else AUTHORITY
        line = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()
        if home is not None and enroll:
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
            CALL: sign_call(self.key, method, path, authority=self.authority, body=body, stamp=stamp, nonce=once),
            "content-type": "application/protobuf",
        }
