"""Flower's Runtime API (for a task), through a client that flwr does not publish."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import httpx
from flwr.app import ConfigRecord, Message
from flwr.app.error import Error
from flwr.app.message import make_message, remove_content_from_message
from flwr.common.constant import SubStatus
from flwr.common.serde import message_from_proto, message_to_proto, user_config_from_proto
from flwr.proto import message_pb2, node_pb2, runtime_pb2
from flwr.supercore.inflatable import inflatable_object, inflatable_utils
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf, make_push_object_fn_protobuf
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.retry import RetryInvoker, RetryState, exponential
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity

from fedlora.core.codes import Code
from fedlora.core.errors import ConnectionFailed, Oversized, WireError
from fedlora.flower._internals.parts import (
    batches,
    check_stated,
    children_of,
    count_parts,
    kind_of,
    pull_some,
    tree_of,
    unfold_array,
)
from fedlora.gateway.addresses import LOOPBACK
from fedlora.gateway.replies import most_parts

T = TypeVar("T")

BROKEN, TOO_LARGE = 1000, 1001
"""Our error codes beside Flower's 0 to 8: a message that cannot be decoded, or is too large when decoded."""

_ONCE = "once"  # a random number in each record of names
_RETRIED = (500, 502, 503, 504)
_FAULT_S = 20.0  # for 500s: a database that another call has locked for a moment; a full disk stays full
_OVERHEAD_BYTES = 1 << 16  # of a message's objects that are no chunks


class WrongSecret(ConnectionFailed):
    """A Flower process on this host refuses the secret that it was started with."""

    code: Code = "wrong-secret"


def patient(patience_s: float, on_outage: Callable[[], None] = lambda: None) -> RetryInvoker:
    """Tries again for that long what may go away by itself."""

    # Not flwr's own make_simple_http_retry_invoker: on 401 that one sends SIGINT to this process, which holds the base model.
    def hopeless(error: Exception) -> bool:
        if isinstance(error, httpx.HTTPStatusError):
            return error.response.status_code not in _RETRIED
        return "certificate" in str(error).lower()

    def on_backoff(state: RetryState) -> None:
        error = state.exception
        if isinstance(error, httpx.HTTPStatusError) and error.response.status_code == 500 and state.elapsed_time >= _FAULT_S:
            raise error
        if state.tries == 1 and isinstance(error, httpx.TransportError):
            on_outage()

    return RetryInvoker(
        lambda: exponential(base_delay=0.2, max_delay=5),
        (httpx.TransportError, httpx.HTTPStatusError),
        max_tries=None,
        max_time=patience_s,
        on_backoff=on_backoff,
        should_giveup=hopeless,
    )


def call(method: Callable[[Any], T], request: object, *, on_401: type[ConnectionFailed] = ConnectionFailed) -> T:
    """Makes one request; turns httpx's errors into ours."""
    try:
        return method(request)
    except httpx.HTTPStatusError as e:
        failed = on_401 if e.response.status_code == httpx.codes.UNAUTHORIZED else ConnectionFailed
        raise failed(f"Flower answered {e.response.status_code} to {e.request.url.path}") from None
    except (httpx.HTTPError, OSError, ValueError) as e:
        raise ConnectionFailed(f"no answer from Flower: {type(e).__name__}") from None


def _runtime(address: str, ca: Path | None, retry: RetryInvoker, *interceptors: object) -> Any:
    if ca is None and not address.startswith(f"{LOOPBACK}:"):
        raise ValueError("without TLS only on loopback")
    return RuntimeHttpClient.from_server_address(
        server_address=address,
        insecure=ca is None,
        root_certificates=None if ca is None else str(ca),
        interceptors=[RuntimeVersionHttpInterceptor(component_name="fedlora"), *interceptors],
        retry_invoker=retry,
    )


class Claimer:
    """Asks a Runtime API for waiting tasks.

    Args:
        kind: ``flwr-serverapp`` or ``flwr-clientapp``.
        address: loopback host:port of the SuperLink or SuperNode.
        secret: what its ``--superexec-auth-secret-file`` holds.
        ca: None for plain HTTP, on loopback only.
    """

    def __init__(self, kind: str, *, address: str, secret: bytes, ca: Path | None) -> None:
        key = SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=frozenset({"/flwr.proto.Runtime/AcquireTask"}))
        self._request = runtime_pb2.AcquireTaskRequest(supported_task_types=[kind])
        self._client = _runtime(address, ca, patient(0.0), key)

    def claim(self) -> str:
        """A task's token, or an empty string if nothing waits.

        Raises:
            WrongSecret: the API answers and refuses the secret.
            ConnectionFailed: no answer.
        """
        return str(call(self._client.AcquireTask, self._request, on_401=WrongSecret).token)

    def close(self) -> None:
        self._client.close()


@dataclass(frozen=True, slots=True)
class Claim:
    """A claimed task.

    Attributes:
        run_id, task_id, node_id: Flower's numbers.
        bundle: bytes of the bundle, to be hashed and nothing else.
        config: the run's overrides of the bundle's config.
    """

    run_id: int
    task_id: int
    node_id: int
    bundle: bytes
    config: Mapping[str, object]


class TaskClient:
    """A claimed task's connection to its Runtime API; for a run it is also the channel to the sites.

    Every method raises ConnectionFailed if Flower does not answer within ``patience_s`` or no longer knows the token.
    ``outages`` counts the calls whose first try found no relay.
    """

    def __init__(self, address: str, *, token: str, ca: Path | None, patience_s: float) -> None:
        self.outages = 0
        self._client = _runtime(address, ca, patient(patience_s, self._note_outage), RuntimeTokenHttpInterceptor(token))
        self._run_id = 0
        self._node = node_pb2.Node(node_id=0)
        self._arriving: dict[str, tuple[Any, Any]] = {}

    def identify(self, *, run_id: int, task_id: int, node_id: int) -> None:
        """Sets the sender of messages. Process-wide, because flwr's Message reads it from a global."""
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = task_id, run_id, node_id
        self._run_id, self._node = run_id, node_pb2.Node(node_id=node_id)

    def start(self) -> Claim:
        """Tells Flower that the task has started, and sends messages in its name from now on."""
        answer = call(self._client.PullTaskInput, runtime_pb2.PullTaskInputRequest())
        claim = Claim(
            run_id=answer.run.run_id,
            task_id=answer.task_id,
            node_id=answer.context.node_id,
            bundle=answer.fab.content,
            config=user_config_from_proto(answer.run.override_config),
        )
        self.identify(run_id=claim.run_id, task_id=claim.task_id, node_id=claim.node_id)
        return claim

    def heartbeat(self) -> bool:
        """Keeps the task alive; False if Flower has stopped it or let it expire."""
        return bool(call(self._client.SendTaskHeartbeat, runtime_pb2.SendTaskHeartbeatRequest()).success)

    def finish(self, error: str) -> None:
        """Ends the task: completed for an empty code, failed otherwise."""
        status = SubStatus.FAILED if error else SubStatus.COMPLETED
        call(self._client.PushTaskOutput, runtime_pb2.PushTaskOutputRequest(sub_status=status, details=error))

    def close(self) -> None:
        self._client.close()

    def _note_outage(self) -> None:
        self.outages += 1

    def get_node_ids(self) -> list[int]:
        """Nodes that are online."""
        return [int(n.node_id) for n in call(self._client.GetNodes, runtime_pb2.GetNodesRequest()).nodes]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Sends messages one by one, each in chunks. A chunk is stored once, to however many sites it goes.

        Returns:
            Ids in order, empty where Flower refused one.
        """
        return [self._push(m) for m in messages]

    def _push(self, message: Message) -> str:
        # An object's id is the digest of its content, and the relay takes any site's word for what an id's parts are. So no id
        # may be foreseen: who registers another site's object first, with other parts, keeps it from being stored.
        for names in _names_of(message):
            names[_ONCE] = secrets.token_hex(16)
        # Metadata are part of the message's content: the id must be set before the tree is taken.
        message.metadata.__dict__["_message_id"] = message.object_id
        objects: dict[str, Any] = {}
        tree = tree_of(message.object_id, message, objects)
        answer = call(
            self._client.PushMessages,
            runtime_pb2.PushAppMessagesRequest(
                messages_list=[message_to_proto(remove_content_from_message(message))], message_object_trees=[tree]
            ),
        )
        push = make_push_object_fn_protobuf(
            self._client.PushObject, self._node, run_id=self._run_id, session_id=answer.session_id
        )
        wanted = set(answer.objects_to_push)
        try:
            for some in batches([i for i in objects if i in wanted]):  # Flower would write out all of them at once
                inflatable_utils.push_objects({i: objects[i] for i in some}, push)
        except (httpx.HTTPError, inflatable_utils.ObjectPushError) as e:
            raise ConnectionFailed(f"a message could not be delivered: {type(e).__name__}") from None
        return str(answer.message_ids[0]) if answer.message_ids else str(message.metadata.message_id)

    def pull_messages(self, message_ids: Iterable[str], *, max_bytes: int) -> list[Message]:
        """Messages that have arrived completely: replies to these ids, or without ids the request of a site's task. Each once.

        Does not wait for a reply that is still being uploaded: one slow site would hold up all others. A message whose parts
        are more than ``max_bytes`` need comes at once with the error TOO_LARGE, none of it pulled; so does one that states
        a longer array, before the array is pulled. One that does not unfold has the error BROKEN.
        """
        asked = list(message_ids)
        for message_id in [i for i in asked or [""] if i not in self._arriving]:
            request = runtime_pb2.PullAppMessagesRequest(message_ids=[message_id] if message_id else [])
            answer = call(self._client.PullMessages, request)
            for head, tree in zip(answer.messages_list, answer.message_object_trees, strict=True):
                self._arriving[message_id] = (message_from_proto(head).metadata, tree)
        arrived = []
        for message_id in asked or [""]:
            if message_id not in self._arriving:
                continue
            tree = self._arriving[message_id][1]
            if count_parts(tree) > most_parts(max_bytes) or self._is_whole(tree):
                arrived.append(self._unfold(*self._arriving.pop(message_id), max_bytes=max_bytes))
        return arrived

    def _is_whole(self, tree: Any) -> bool:
        # The root goes up last, so that it is enough to ask for it.
        request = message_pb2.PullObjectRequest(node=self._node, run_id=self._run_id, object_id=tree.object_id)
        answer = call(self._client.PullObject, request)
        return bool(answer.object_available) or not answer.object_found

    def _unfold(self, head: Any, tree: Any, *, max_bytes: int) -> Message:
        try:
            parts, arrays = self._pull_objects(tree, max_bytes)
            message = inflatable_utils.inflate_object_from_contents(tree.object_id, parts, objects=arrays)
            if not isinstance(message, Message):
                raise WireError("not a message")
            for names in _names_of(message):
                names.pop(_ONCE, None)
        except Oversized:
            message = make_message(metadata=head, error=Error(TOO_LARGE))
        except Exception:  # whatever another site sends must not end the run
            message = make_message(metadata=head, error=Error(BROKEN))
        confirm = message_pb2.ConfirmMessageReceivedRequest(
            node=self._node, run_id=self._run_id, message_object_id=tree.object_id
        )
        call(self._client.ConfirmMessageReceived, confirm)
        message.metadata.__dict__["_message_id"] = tree.object_id
        return message

    def _pull_objects(self, tree: Any, max_bytes: int) -> tuple[dict[str, bytes], dict[str, Any]]:
        """The parts of a message, and its arrays, each filled as its chunks come."""
        if (count := count_parts(tree)) > most_parts(max_bytes):
            raise Oversized(f"a message of {count} parts, for at most {max_bytes} bytes")
        nodes = list(inflatable_object.iterate_object_tree(tree))
        inner = dict.fromkeys(node.object_id for node in nodes if node.children)
        leaves = dict.fromkeys(node.object_id for node in nodes if node.object_id not in inner)
        pull = make_pull_object_fn_protobuf(self._client.PullObject, self._node, run_id=self._run_id)
        sizes: list[int] = []

        def bounded(object_id: str) -> bytes:
            part: bytes = pull(object_id)
            sizes.append(len(part))
            if sum(sizes) > max_bytes + _OVERHEAD_BYTES:
                raise Oversized(f"a message of more than {max_bytes} bytes")
            return part

        try:
            parts = dict(pull_some(list(inner), bounded))
            check_stated(parts, max_bytes)
            arrays = {
                i: unfold_array(part, partial(pull_some, pull=bounded)) for i, part in parts.items() if kind_of(part) == "Array"
            }
            chunks = {child for i in arrays for child in children_of(parts[i])}
            parts.update(pull_some([i for i in leaves if i not in chunks], bounded))
            return parts, arrays
        except (httpx.HTTPError, inflatable_utils.ObjectPullError) as e:
            raise WireError(f"a message is incomplete: {type(e).__name__}") from None


def _names_of(message: Message) -> list[ConfigRecord]:
    return [r for r in message.content.values() if isinstance(r, ConfigRecord)] if message.has_content() else []
