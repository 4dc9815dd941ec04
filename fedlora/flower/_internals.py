"""Every non-public part of flwr that FedLoRA uses, in one file: they move with each minor release.

``tests/flower/test_contract.py`` checks names and signatures. Written against flwr 1.41.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import httpx
from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.constant import SubStatus
from flwr.common.serde import fab_to_proto, message_to_proto, user_config_from_proto, user_config_to_proto
from flwr.proto import control_pb2, message_pb2, node_pb2, runtime_pb2
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable import inflatable_object, inflatable_utils
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf, make_push_object_fn_protobuf
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.retry import RetryInvoker, exponential
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity

from fedlora.errors import ConnectionFailed, Oversized, WireError
from fedlora.flower.launch import LOOPBACK

__all__ = ["Channel", "Claim", "Control", "Node", "RunState", "TaskClient", "claim_task"]

T = TypeVar("T")

_RETRIED = (502, 503, 504)
_MAX_OBJECTS = 4096
_OVERHEAD_BYTES = 1 << 20
_STRAGGLING_PART_S = 10.0


class Channel(Protocol):
    """The part of Flower's Grid that a server's transport needs. Flower's own Grid has it; :class:`TaskClient` has it too."""

    def get_node_ids(self) -> Iterable[int]: ...
    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]: ...
    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Takes what has arrived whole: replies to these ids, or for no ids the instruction of a site's task. At most once each.

        Does not wait for a reply that is still being uploaded: one slow site would hold up all others.

        Raises:
            Oversized: a message would unfold to more than ``max_bytes``; it is thrown away.
            WireError: it does not unfold at all; likewise.
        """
        asked = list(message_ids)
        for message_id in [i for i in asked or [""] if i not in self._arriving]:
            request = runtime_pb2.PullAppMessagesRequest(message_ids=[message_id] if message_id else [])
            answer = _call(self._client.PullMessages, request)
            for head, tree in zip(answer.messages_list, answer.message_object_trees, strict=True):
                self._arriving[message_id] = (head.metadata.message_id, tree)
        arrived = []
        for message_id in asked or [""]:
            if message_id in self._arriving and self._is_whole(self._arriving[message_id][1]):
                arrived.append(self._unfold(*self._arriving.pop(message_id)))
        return arrived

    def _is_whole(self, tree: Any) -> bool:
        # The root goes up last, so that it is enough to ask for it.
        request = message_pb2.PullObjectRequest(node=self._node, run_id=self._run_id, object_id=tree.object_id)
        answer = _call(self._client.PullObject, request)
        return bool(answer.object_available) or not answer.object_found

    def _unfold(self, message_id: str, tree: Any) -> Message:
        try:
            parts = self._pull_objects(tree)
            _check_unfolded(parts, self._max_bytes)
            message = inflatable_utils.inflate_object_from_contents(message_id, parts)
            if not isinstance(message, Message):
                raise WireError("not a message")
        except (Oversized, WireError):
            raise
        except Exception as e:  # whatever another site sends must not end the run
            raise WireError(f"a message does not unfold: {type(e).__name__}") from None
        finally:
            confirm = message_pb2.ConfirmMessageReceivedRequest(
                node=self._node, run_id=self._run_id, message_object_id=message_id
            )
            _call(self._client.ConfirmMessageReceived, confirm)
        message.metadata.__dict__["_message_id"] = message_id
        return message

    def _pull_objects(self, tree: Any) -> dict[str, bytes]:
        ids = list(dict.fromkeys(node.object_id for node in inflatable_object.iterate_object_tree(tree)))
        if len(ids) > _MAX_OBJECTS:
            raise Oversized(f"a message of {len(ids)} parts")
        pull = make_pull_object_fn_protobuf(self._client.PullObject, self._node, run_id=self._run_id)
        sizes: list[int] = []

        def bounded(object_id: str) -> bytes:
            part = pull(object_id)
            sizes.append(len(part))
            if sum(sizes) > self._max_bytes + _OVERHEAD_BYTES:
                raise Oversized(f"a message of more than {self._max_bytes} bytes")
            return part

        try:
            return dict(inflatable_utils.pull_objects(ids, bounded, max_time=_STRAGGLING_PART_S))
        except (httpx.HTTPError, inflatable_utils.ObjectPullError) as e:
            raise WireError(f"a message is incomplete: {type(e).__name__}") from None


def _check_unfolded(parts: Mapping[str, bytes], max_bytes: int) -> None:
    """Adds up what arrays will hold before any is unfolded: one may name the same chunk a million times.

    Raises:
        Oversized: more than ``max_bytes`` together.
    """
    total = 0
    for part in parts.values():
        kind, children, _ = inflatable_object.get_object_head_values_from_object_content(part)
        if kind == "Array":
            table = json.loads(part[part.index(b"\x00") + 1 :])
            total += sum(len(parts[children[i]]) for i in table["arraychunk_ids"])
            if total > max_bytes + _OVERHEAD_BYTES:
                raise Oversized(f"a message that unfolds to more than {max_bytes} bytes")


@dataclass(frozen=True, slots=True)
class Node:
    """A registered node: its id, its public key (PEM) and ``registered``, ``online``, ``offline`` or ``unregistered``."""

    id: int
    key: bytes
    status: str


@dataclass(frozen=True, slots=True)
class RunState:
    """Where a run stands: ``pending``, ``starting``, ``running`` or ``finished``; then how, and with which error code.

    Attributes:
        outcome: empty, ``completed``, ``failed`` or ``stopped``.
        error: code of the error that ended it, if one did.
    """

    id: int
    status: str
    outcome: str
    error: str


class Control:
    """The SuperLink's Control API, on loopback. It asks for no password: who reaches it commands the SuperLink.

    Every method raises ConnectionFailed if the SuperLink does not answer or refuses.
    """

    def __init__(self, port: int, *, ca: Path, patience_s: float) -> None:
        self._client = ControlHttpClient.from_server_address(
            server_address=f"{LOOPBACK}:{port}",
            insecure=False,
            root_certificates=str(ca),
            interceptors=[RuntimeVersionHttpInterceptor(component_name="fedlora")],
            retry_invoker=_patient(patience_s),
        )

    def register(self, key: bytes) -> int:
        return int(_call(self._client.RegisterNode, control_pb2.RegisterNodeRequest(public_key=key)).node_id)

    def unregister(self, node_id: int) -> None:
        _call(self._client.UnregisterNode, control_pb2.UnregisterNodeRequest(node_id=node_id))

    def nodes(self) -> list[Node]:
        answer = _call(self._client.ListNodes, control_pb2.ListNodesRequest())
        return [Node(int(n.node_id), bytes(n.public_key), str(n.status)) for n in answer.nodes_info]

    def start_run(self, bundle: bytes, *, sha256: str, config: Mapping[str, str]) -> int:
        request = control_pb2.StartRunRequest(
            fab=fab_to_proto(Fab(sha256, bundle, {})), override_config=user_config_to_proto(dict(config))
        )
        answer = _call(self._client.StartRun, request)
        if not answer.HasField("run_id"):
            raise ConnectionFailed("the SuperLink did not take the run")
        return int(answer.run_id)

    def run_state(self, run_id: int) -> RunState:
        runs = _call(self._client.ListRuns, control_pb2.ListRunsRequest(run_id=run_id)).run_dict
        if run_id not in runs:
            raise ConnectionFailed(f"the SuperLink knows no run {run_id}")
        status = runs[run_id].status
        return RunState(run_id, str(status.status), str(status.sub_status), str(status.details))

    def stop_run(self, run_id: int) -> bool:
        return bool(_call(self._client.StopRun, control_pb2.StopRunRequest(run_id=run_id)).success)

    def close(self) -> None:
        self._client.close()
