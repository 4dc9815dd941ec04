"""An enrolled site that speaks to the relay by hand: whatever it likes, signed with its own key."""

from __future__ import annotations

import http.client
import ssl
import time
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from flower.signed import Node, announcement
from flwr.proto import fleet_pb2, heartbeat_pb2, message_pb2, node_pb2

from fedlora.gateway.addresses import split_address


class Liar:
    """Takes the place of a site's SuperNode.

    Args:
        root: the site's directory; enrolled already.
    """

    def __init__(self, root: Path, *, listen: str, home: Path) -> None:
        self.signer = Node(root, "node", home=home, enroll=False)
        self.connection = http.client.HTTPSConnection(
            *split_address(listen), context=ssl.create_default_context(cafile=str(home / "tls" / "ca.crt")), timeout=60
        )
        pem = self.signer.key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        status, answer = self.call("activate-node", fleet_pb2.ActivateNodeRequest(public_key=pem, heartbeat_interval=60))
        assert status == 200, status
        self.node = int(fleet_pb2.ActivateNodeResponse.FromString(answer).node_id)

    def call(self, name: str, message: Any) -> tuple[int, bytes]:
        """Status and body of the answer."""
        body, path = message.SerializeToString(), f"/v1/fleet/{name}"
        try:
            self.connection.request("POST", path, body=body, headers=self.signer.headers(path, body))
            answer = self.connection.getresponse()
            return answer.status, answer.read()
        finally:
            self.connection.close()

    def request(self, *, timeout_s: float = 60.0) -> message_pb2.Metadata:
        """The next request that the run sends to this site."""
        return self.pull(timeout_s=timeout_s)[0]

    def pull(self, *, timeout_s: float = 60.0) -> tuple[message_pb2.Metadata, message_pb2.ObjectTree]:
        """The same, with its tree."""
        here = heartbeat_pb2.SendNodeHeartbeatRequest(node=node_pb2.Node(node_id=self.node), heartbeat_interval=60)
        assert self.call("send-node-heartbeat", here)[0] == 200
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            _, body = self.call("pull-messages", fleet_pb2.PullMessagesRequest(node=node_pb2.Node(node_id=self.node)))
            found = fleet_pb2.PullMessagesResponse.FromString(body)
            for message, tree in zip(found.messages_list, found.message_object_trees, strict=True):
                return message.metadata, tree
            time.sleep(0.2)
        raise AssertionError("no request came")

    def confirm(self, request: message_pb2.Metadata) -> int:
        """Says that it has all of a request, which the relay then deletes; the status."""
        node = node_pb2.Node(node_id=self.node)
        message = message_pb2.ConfirmMessageReceivedRequest(
            node=node, run_id=request.run_id, message_object_id=request.message_id
        )
        return self.call("confirm-message-received", message)[0]

    def reply(self, to: message_pb2.Metadata, *, parts: int = 5) -> fleet_pb2.PushMessagesRequest:
        """The announcement of a reply."""
        return announcement(node=self.node, parts=parts, run_id=to.run_id, reply_to=to.message_id)

    def announce(self, message: fleet_pb2.PushMessagesRequest) -> int:
        """The status."""
        return self.call("push-messages", message)[0]
