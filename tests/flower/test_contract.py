"""flwr's non-public parts are what ``flower/_internals`` takes them for. If one of these fails, that folder needs work."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import re
import time
from functools import partial

import httpx
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.app.error import Error
from flwr.app.message import make_message, remove_content_from_message
from flwr.common import serde
from flwr.common.constant import (
    FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE,
    HEARTBEAT_PATIENCE,
    SYSTEM_TIME_TOLERANCE,
    TIMESTAMP_HEADER,
    TIMESTAMP_TOLERANCE,
    ErrorCode,
    SubStatus,
)
from flwr.proto import control_pb2, fleet_pb2, message_pb2, node_pb2, runtime_pb2
from flwr.supercore import heartbeat
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.exit import signal_handler
from flwr.supercore.inflatable import inflatable_object, inflatable_utils
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf, make_push_object_fn_protobuf
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.primitives.asymmetric import generate_key_pairs
from flwr.supercore.protobuf.client import ProtobufRequestContext
from flwr.supercore.retry import RetryInvoker, exponential, http_retry
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.routers.fleet import node_auth
from flwr.superlink.servicer.fleet import fleet_handlers
from flwr.supernode import fleet_http_connection as connection
from flwr.supernode import node_auth_http_interceptor as auth
from flwr.supernode import start_client_internal as loop
from flwr.supernode.fleet_http_client import FleetHttpClient
from google.protobuf.descriptor import FieldDescriptor

from fedlora.core.errors import ConnectionFailed, Oversized, WireError
from fedlora.flower._internals import runtime, supernode
from fedlora.flower._internals.parts import CHUNK_BYTES, check_stated, tree_of, unfold_array
from fedlora.flower._internals.runtime import BROKEN, TOO_LARGE
from fedlora.flower._internals.supernode import signing
from fedlora.flower.coordinator import presence
from fedlora.flower.records import STYPE, blob_of
from fedlora.gateway import clock, doors, replies
from fedlora.gateway.app import FLEET_CALLS, NOT_ENROLLED
from fedlora.gateway.calls import AHEAD_S, BEHIND_S, CALL, KEY, TIME
from fedlora.gateway.exposure import free_port

pytestmark = pytest.mark.slow  # to import flwr, that is


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (RuntimeHttpClient.from_server_address, "server_address insecure root_certificates interceptors retry_invoker"),
        (ControlHttpClient.from_server_address, "server_address insecure root_certificates interceptors retry_invoker"),
        (RuntimeTokenHttpInterceptor, "token"),
        (RuntimeVersionHttpInterceptor, "component_name"),
        (SuperExecAuthHttpInterceptor, "master_secret protected_methods"),
        (RetryInvoker, "wait_gen_factory recoverable_exceptions max_tries max_time on_backoff should_giveup"),
        (exponential, "base_delay max_delay"),
        (make_pull_object_fn_protobuf, "pull_object_protobuf node run_id"),
        (make_push_object_fn_protobuf, "push_object_protobuf node run_id session_id"),
        (inflatable_utils.push_objects, "objects push_object_fn"),
        (inflatable_utils.pull_objects, "object_ids pull_object_fn max_time"),
        (inflatable_utils.inflate_object_from_contents, "object_id object_contents objects"),
        (inflatable_object.iterate_object_tree, "tree"),
        (inflatable_object.get_object_head_values_from_object_content, "object_content"),
        (remove_content_from_message, "message"),
        (make_message, "metadata error"),
        (Error, "code reason"),
        (serde.message_to_proto, "message"),
        (serde.message_from_proto, "message_proto"),
        (serde.fab_to_proto, "fab"),
        (serde.user_config_to_proto, "user_config"),
        (serde.user_config_from_proto, "proto"),
    ],
)
def test_a_function_still_takes_what_we_give_it(function, parameters):
    assert set(parameters.split()) <= set(inspect.signature(function).parameters)


@pytest.mark.parametrize(
    ("client", "methods"),
    [
        (
            RuntimeHttpClient,
            "AcquireTask SendTaskHeartbeat PullTaskInput PushTaskOutput PushObject PullObject ConfirmMessageReceived "
            "PushMessages PullMessages GetNodes close",
        ),
        (ControlHttpClient, "StartRun StopRun ListRuns ListNodes RegisterNode UnregisterNode close"),
    ],
)
def test_a_client_still_has_the_calls_we_make(client, methods):
    for name in methods.split():
        assert callable(getattr(client, name))


@pytest.mark.parametrize(
    ("message", "fields"),
    [
        (runtime_pb2.AcquireTaskRequest, "supported_task_types"),
        (runtime_pb2.AcquireTaskResponse, "token"),
        (runtime_pb2.PullTaskInputResponse, "context run fab task_id"),
        (runtime_pb2.PushTaskOutputRequest, "sub_status details"),
        (runtime_pb2.PushAppMessagesRequest, "messages_list message_object_trees"),
        (runtime_pb2.PushAppMessagesResponse, "message_ids objects_to_push session_id"),
        (runtime_pb2.PullAppMessagesRequest, "message_ids"),
        (runtime_pb2.PullAppMessagesResponse, "messages_list message_object_trees"),
        (message_pb2.PullObjectRequest, "node run_id object_id"),
        (message_pb2.PullObjectResponse, "object_found object_available object_content"),
        (message_pb2.ConfirmMessageReceivedRequest, "node run_id message_object_id"),
        (control_pb2.StartRunRequest, "fab override_config"),
        (control_pb2.ListRunsRequest, "run_id"),
        (control_pb2.ListRunsResponse, "run_dict"),
        (control_pb2.ListNodesResponse, "nodes_info"),
        (control_pb2.RegisterNodeRequest, "public_key"),
    ],
)
def test_a_protobuf_message_still_has_our_fields(message, fields):
    assert set(fields.split()) <= set(message.DESCRIPTOR.fields_by_name)


@pytest.mark.parametrize(
    ("ours", "flowers"),
    [
        (replies.REQUEST, fleet_pb2.PushMessagesRequest),
        (replies.PULLED, fleet_pb2.PullMessagesResponse),
        (replies.NODE, node_pb2.Node),
        (replies.MESSAGE, message_pb2.Message),
        (replies.METADATA, message_pb2.Metadata),
        (replies.TREE, message_pb2.ObjectTree),
    ],
)
def test_the_gateway_reads_announcements_and_pulls_by_flowers_fields(ours, flowers):
    kinds = {FieldDescriptor.TYPE_UINT64: (0,), FieldDescriptor.TYPE_DOUBLE: (1,)}
    found = {f.number: (f.name, kinds.get(f.type, (2,))) for f in flowers.DESCRIPTOR.fields}
    packed = {n: (f.name, (1, 2)) for n, f in ours.items() if f.kinds == (1, 2)}  # Flower takes numbers in either form
    assert {n: tuple(f) for n, f in ours.items()} == found | packed


def test_the_task_that_is_claimed_is_authenticated_under_this_name():
    assert "/flwr.proto.Runtime/AcquireTask" in inspect.getsource(RuntimeHttpClient.AcquireTask)


def test_constants_are_what_we_write():
    assert (SubStatus.FAILED, SubStatus.COMPLETED) == ("failed", "completed")
    codes = [v for k, v in vars(ErrorCode).items() if k.isupper()]
    assert max(codes) < BROKEN < TOO_LARGE
    assert {"task_id", "run_id", "node_id"} <= set(dir(type(TaskIdentity)))


def test_the_gateway_passes_just_what_a_supernode_with_a_key_calls():
    calls = set(re.findall(r'"(/v1/fleet/[^"]+)"', inspect.getsource(FleetHttpClient)))
    assert calls - FLEET_CALLS == {"/v1/fleet/register-node", "/v1/fleet/unregister-node"}
    assert calls >= FLEET_CALLS


def unfolding(body: bytes, *, times: int) -> dict[str, bytes]:
    """The parts of a record whose array names its one chunk ``times`` times."""
    array = Array(dtype="uint8", shape=(len(body),), stype=STYPE, data=body)
    content = RecordDict({"fedlora": ConfigRecord({"site": "a", "error": ""}), "body": ArrayRecord({"blob": array})})
    parts = {}
    for part in (o.deflate() for o in inflatable_object.get_all_nested_objects(content).values()):
        if part.startswith(b"Array "):
            head, _, table = part.partition(b"\0")
            table = json.dumps({**json.loads(table), "arraychunk_ids": [0] * times}).encode()
            part = b" ".join([*head.split(b" ")[:-1], str(len(table)).encode()]) + b"\0" + table
        parts[hashlib.sha256(part).hexdigest()] = part
    return parts


def test_a_small_message_that_would_unfold_to_terabytes_is_refused_before_it_does():
    def unfolded(parts):
        (head,) = (p for p in parts.values() if p.startswith(b"Array "))
        return unfold_array(head, lambda ids: {i: parts[i] for i in ids})

    body = bytes(range(256)) * (1 << 12)
    assert unfolded(unfolding(body, times=1)).data == body
    bomb = unfolding(body, times=4_000_000)
    assert sum(map(len, bomb.values())) < 20 << 20
    with pytest.raises(Oversized):
        unfolded(bomb)
    with pytest.raises(WireError):
        unfolded(unfolding(body, times=0))


@pytest.mark.parametrize("body", [b"", b"x", bytes(100)])
@pytest.mark.parametrize("times", [2, 5_000])
def test_no_array_has_more_chunks_than_its_bytes_make(body, times):
    """Each is pulled through the relay: five thousand of an empty one would hold a round up for minutes."""
    (head,) = (p for p in unfolding(body, times=times).values() if p.startswith(b"Array "))

    def pull(ids):
        raise AssertionError("a chunk was pulled")

    with pytest.raises(Oversized, match="chunks"):
        unfold_array(head, pull)


@pytest.mark.parametrize("stated", [1, 99])
def test_an_array_whose_chunk_has_more_bytes_than_it_states_is_refused_as_such(stated):
    parts = unfolding(bytes(100), times=1)
    (head,) = (p for p in parts.values() if p.startswith(b"Array "))
    about, _, table = head.partition(b"\0")
    table = json.dumps({**json.loads(table), "shape": [stated]}).encode()
    head = b" ".join([*about.split(b" ")[:-1], str(len(table)).encode()]) + b"\0" + table
    with pytest.raises(Oversized, match="unfolds to more"):
        unfold_array(head, lambda ids: {i: parts[i] for i in ids})


def test_a_long_message_is_the_same_after_it_was_cut_and_unfolded_a_few_chunks_at_a_time():
    body = os.urandom(9 * CHUNK_BYTES + 17)
    objects = {}
    tree = tree_of("root", RecordDict({"body": ArrayRecord({"blob": blob_of(body)})}), objects)
    assert list(objects)[-1] == tree.object_id == "root"
    parts = {i: part.deflate() for i, part in objects.items()}
    assert all(hashlib.sha256(part).hexdigest() == i for i, part in parts.items() if i != "root")
    (head,) = (p for p in parts.values() if p.startswith(b"Array "))
    asked = []

    def pull(ids):
        asked.append(len(ids))
        return {i: parts[i] for i in ids}

    assert unfold_array(head, pull).data == body
    assert asked == [2] * 5


def test_an_array_of_a_negative_size_pays_for_no_other_one():
    parts = unfolding(bytes(10), times=1)
    (head,) = (p for p in parts.values() if p.startswith(b"Array "))
    table = json.loads(head.partition(b"\0")[2])
    less = head.partition(b"\0")[0] + b"\0" + json.dumps({**table, "shape": [-(1 << 40)]}).encode()
    more = head.partition(b"\0")[0] + b"\0" + json.dumps({**table, "shape": [1 << 40]}).encode()
    with pytest.raises(WireError):
        check_stated({"a": less, "b": more}, 1000)


def test_a_call_is_signed_where_flower_signs_its_time_stamp():
    assert "NodeAuthHttpInterceptor(private_key, public_key)," in inspect.getsource(connection.http_request_response)
    assert list(inspect.signature(connection.NodeAuthHttpInterceptor.intercept).parameters) == ["self", "context", "call_next"]
    key, public = generate_key_pairs()
    request = httpx.Request("POST", "https://h:1/v1/fleet/get-run", content=b"body")
    seen = []
    signing(connection.NodeAuthHttpInterceptor, authority="a" * 64)(key, public).intercept(
        ProtobufRequestContext("/flwr.proto.Fleet/GetRun", message_pb2.PullObjectRequest(), request),
        lambda c: seen.append(c.request),
    )
    assert {TIME, KEY, "flwr-signature", CALL} <= set(seen[0].headers)
    assert (TIME, KEY) == (TIMESTAMP_HEADER, FLEET_HTTP_PUBLIC_KEY_HEADER)
    assert (AHEAD_S, BEHIND_S) == (SYSTEM_TIME_TOLERANCE, TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE)
    assert FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE == CHUNK_BYTES


def test_who_is_not_enrolled_hears_what_flower_says():
    error = FlowerError.from_json(NOT_ENROLLED.decode())
    assert (error.code, error.message) == (ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED, "Failed to activate SuperNode.")


def test_a_length_that_is_stated_is_refused_before_the_chunks_are_there():
    parts = unfolding(bytes(1001), times=1)
    inner = {k: p for k, p in parts.items() if not p.startswith(b"ArrayChunk ")}
    assert len(inner) < len(parts)
    check_stated(inner, 1001)
    with pytest.raises(Oversized, match="states 1001 bytes, at most 1000"):
        check_stated(inner, 1000)


def test_the_supernodes_loop_waits_by_the_names_that_are_replaced():
    source = inspect.getsource(loop)
    assert set(re.findall(r"\btime\.(\w+)", source)) == {"sleep"}
    assert "time.sleep(3)" in inspect.getsource(loop.start_client_internal)
    assert "_push_messages(" in inspect.getsource(loop.start_client_internal)


def test_a_supernode_sends_signs_of_life_as_often_as_its_module_says_and_is_waited_for_as_before():
    interval = "next_interval: float = HEARTBEAT_DEFAULT_INTERVAL - HEARTBEAT_CALL_TIMEOUT"
    assert interval in inspect.getsource(heartbeat.HeartbeatSender)
    assert heartbeat.HEARTBEAT_CALL_TIMEOUT == 5
    longest = (supernode._SIGN_S - 5) * (heartbeat.HEARTBEAT_BASE_MULTIPLIER + heartbeat.HEARTBEAT_RANDOM_RANGE[1])
    assert 2 * longest < presence._SILENT_S  # one may be lost
    assert "heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL" in inspect.getsource(connection)
    assert connection.HEARTBEAT_DEFAULT_INTERVAL * HEARTBEAT_PATIENCE == 60
    assert {"online_until", "heartbeat_interval"} <= set(node_pb2.NodeInfo.DESCRIPTOR.fields_by_name)


def test_what_stands_around_the_supernodes_calls_is_called_by_these_names():
    assert list(inspect.signature(auth.NodeAuthHttpInterceptor.intercept).parameters) == ["self", "context", "call_next"]
    assert "timestamp = now().isoformat()" in inspect.getsource(auth.NodeAuthHttpInterceptor.intercept)
    assert "add_headers(\n            context.request," in inspect.getsource(auth.NodeAuthHttpInterceptor.intercept)
    assert callable(auth.now)
    assert (doors.KEY_HEADER, doors.SIGNATURE_HEADER) == (FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER)
    assert doors.STAMP_HEADER == TIMESTAMP_HEADER
    assert (clock.ACCEPTED_AHEAD_S, clock.ACCEPTED_BEHIND_S) == (
        SYSTEM_TIME_TOLERANCE,
        TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE,
    )
    assert "max_delay=MAX_RETRY_DELAY" in inspect.getsource(http_retry.make_simple_http_retry_invoker)


def test_flower_puts_back_the_signal_handler_that_was_there_before():
    assert "register_signal_handlers(" in inspect.getsource(loop.start_client_internal)
    source = inspect.getsource(signal_handler.register_signal_handlers)
    assert "default_handler = signal.signal(sig, graceful_exit_handler)" in source
    assert "signal.signal(sig, default_handlers[sig])" in source


def test_flower_answers_412_to_a_key_that_it_does_not_know_and_to_one_in_use_and_401_to_a_stamp():
    source = inspect.getsource(fleet_handlers.activate_node)
    assert source.count("raise ValueError") == 2
    assert "ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED" in source
    assert "HTTP_401_UNAUTHORIZED" in inspect.getsource(node_auth.authenticate_node)


@pytest.mark.parametrize(("failures", "works"), [(3, True), (10_000, False)])
def test_a_relay_that_fails_is_asked_again_for_a_while(monkeypatch, failures, works):
    """Not for as long as one that is away: a full disk stays full, and its operator should hear of it."""
    monkeypatch.setattr(runtime, "_FAULT_S", 1.0)
    answers = iter([500] * failures + [200])

    def call(request):
        status = next(answers)
        response = httpx.Response(status, request=httpx.Request("POST", "https://h/v1/runtime/push-messages"))
        response.raise_for_status()
        return status

    invoker, began = runtime.patient(30.0), time.monotonic()
    if works:
        assert invoker.invoke(call, None) == 200
    else:
        with pytest.raises(ConnectionFailed, match="answered 500"):
            runtime.call(lambda request: invoker.invoke(call, request), None)
    assert time.monotonic() - began < 20


def test_a_client_counts_the_calls_that_found_no_relay():
    """And not those that it answered with an error: what it gives out once, it still has."""
    client = runtime.TaskClient(f"127.0.0.1:{free_port()}", token="t", ca=None, patience_s=1.0)
    for calls in (1, 2):
        with pytest.raises(ConnectionFailed):
            client.get_node_ids()
        assert client.outages == calls
    client.close()

    def call(request):
        response = httpx.Response(503, request=httpx.Request("POST", "https://h/v1/runtime/push-messages"))
        response.raise_for_status()

    noted: list[int] = []
    with pytest.raises(ConnectionFailed, match="answered 503"):
        runtime.call(partial(runtime.patient(0.5, lambda: noted.append(1)).invoke, call), None)
    assert not noted
