"""Flower's Control API (of a SuperLink), through a client that flwr does not publish."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.common.constant import HEARTBEAT_PATIENCE
from flwr.common.serde import fab_to_proto, user_config_to_proto
from flwr.proto import control_pb2
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

from fedlora.core.errors import ConnectionFailed
from fedlora.flower._internals.runtime import call, patient
from fedlora.gateway.addresses import LOOPBACK


@dataclass(frozen=True, slots=True)
class Node:
    """A registered node: its id, its public key (PEM) and ``registered``, ``online``, ``offline`` or ``unregistered``.

    Attributes:
        heard: its last sign of life, seconds since 1970.
    """

    id: int
    key: bytes
    status: str
    heard: float


@dataclass(frozen=True, slots=True)
class RunState:
    """State of a run: ``pending``, ``starting``, ``running`` or ``finished``; then how, and with which error code.

    Attributes:
        outcome: empty, ``completed``, ``failed`` or ``stopped``.
        error: code of the error that ended it, if one did.
    """

    id: int
    status: str
    outcome: str
    error: str


class Control:
    """The SuperLink's Control API, on loopback. It has no password: everybody who can reach it can start and stop runs.

    Every method raises ConnectionFailed if the SuperLink does not answer or refuses.
    """

    def __init__(self, port: int, *, ca: Path, patience_s: float) -> None:
        self._client = ControlHttpClient.from_server_address(
            server_address=f"{LOOPBACK}:{port}",
            insecure=False,
            root_certificates=str(ca),
            interceptors=[RuntimeVersionHttpInterceptor(component_name="fedlora")],
            retry_invoker=patient(patience_s),
        )

    def register(self, key: bytes) -> int:
        return int(call(self._client.RegisterNode, control_pb2.RegisterNodeRequest(public_key=key)).node_id)

    def unregister(self, node_id: int) -> None:
        call(self._client.UnregisterNode, control_pb2.UnregisterNodeRequest(node_id=node_id))

    def nodes(self) -> list[Node]:
        answer = call(self._client.ListNodes, control_pb2.ListNodesRequest())
        return [
            Node(int(n.node_id), bytes(n.public_key), str(n.status), n.online_until - HEARTBEAT_PATIENCE * n.heartbeat_interval)
            for n in answer.nodes_info
        ]

    def start_run(self, bundle: bytes, *, sha256: str, config: Mapping[str, str]) -> int:
        request = control_pb2.StartRunRequest(
            fab=fab_to_proto(Fab(sha256, bundle, {})), override_config=user_config_to_proto(dict(config))
        )
        answer = call(self._client.StartRun, request)
        if not answer.HasField("run_id"):
            raise ConnectionFailed("the SuperLink did not take the run")
        return int(answer.run_id)

    def run_state(self, run_id: int) -> RunState:
        runs = call(self._client.ListRuns, control_pb2.ListRunsRequest(run_id=run_id)).run_dict
        if run_id not in runs:
            raise ConnectionFailed(f"the SuperLink knows no run {run_id}")
        return _state_of(run_id, runs[run_id])

    def runs(self) -> dict[int, RunState]:
        """The last thousand runs, by Flower's id."""
        runs = call(self._client.ListRuns, control_pb2.ListRunsRequest(limit=1000)).run_dict
        return {int(i): _state_of(int(i), r) for i, r in runs.items()}

    def stop_run(self, run_id: int) -> bool:
        return bool(call(self._client.StopRun, control_pb2.StopRunRequest(run_id=run_id)).success)

    def close(self) -> None:
        self._client.close()


def _state_of(run_id: int, run: Any) -> RunState:
    return RunState(run_id, str(run.status.status), str(run.status.sub_status), str(run.status.details))
