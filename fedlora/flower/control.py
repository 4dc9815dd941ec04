"""What FedLoRA asks of the SuperLink's Control API: who is registered, and runs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from fedlora.flower._internals import Control, Node, RunState
from fedlora.flower.bundle import bundle_bytes

__all__ = ["Control", "Node", "RunState", "nodes_by_site", "register_sites", "start_job"]


def _live(nodes: list[Node]) -> list[Node]:
    return [n for n in nodes if n.status != "unregistered"]


def register_sites(control: Control, keys: Mapping[str, bytes]) -> dict[str, int]:
    """Makes the SuperLink's list of nodes equal to the enrolled sites. Doing it twice changes nothing.

    Args:
        keys: PEM of each site's node key.

    Returns:
        Node id of each site.

    Raises:
        ConnectionFailed: the SuperLink refuses; for a key that was removed once, that is for good.
    """
    known = {n.key: n.id for n in _live(control.nodes())}
    for key, node_id in known.items():
        if key not in keys.values():
            control.unregister(node_id)
    return {site: known[key] if key in known else control.register(key) for site, key in keys.items()}


def nodes_by_site(control: Control, keys: Mapping[str, bytes]) -> dict[str, int]:
    """Node ids of the enrolled sites that are registered. Nodes that are nobody's are left out."""
    known = {n.key: n.id for n in _live(control.nodes())}
    return {site: known[key] for site, key in keys.items() if key in known}


def start_job(control: Control, job: str) -> int:
    """Starts a run with the empty bundle. Of its config the sites see ``job`` alone, a random number.

    Returns:
        Flower's id of the run.
    """
    bundle = bundle_bytes()
    return control.start_run(bundle, sha256=hashlib.sha256(bundle).hexdigest(), config={"job": job})
