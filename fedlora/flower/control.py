"""Uses of the SuperLink's Control API: registering sites, starting runs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from fedlora.core.errors import FedLoRAError
from fedlora.flower._internals import Control, Node
from fedlora.flower.bundle import bundle_bytes
from fedlora.flower.environment import join_flower
from fedlora.flower.jobs import load_address

_PATIENCE_S = 10.0


@contextmanager
def opened(home: Path, *, patience_s: float = _PATIENCE_S) -> Iterator[Control]:
    """The Control API of the server that runs in this home.

    Raises:
        ConnectionFailed: none runs, or it does not answer.
    """
    join_flower(home / "flower" / "home")
    control = Control(load_address(home).superlink_port, ca=home / "tls" / "ca.crt", patience_s=patience_s)
    try:
        yield control
    finally:
        control.close()


def _live(nodes: list[Node]) -> list[Node]:
    return [n for n in nodes if n.status != "unregistered"]


def register_sites(
    control: Control,
    keys: Mapping[str, bytes],
    *,
    refused: Callable[[str, FedLoRAError], None] | None = None,
    whole: bool = True,
) -> dict[str, int]:
    """Makes the SuperLink's list of nodes equal to the enrolled sites. Doing it twice changes nothing.

    Args:
        keys: PEM of each site's node key. An empty mapping changes nothing: a missing folder must not expel all sites for good.
        whole: False: a site's key may be missing only because its file is damaged; nobody is expelled, which is for good.
        refused: called for each site whose key the SuperLink refuses; None: the first such site raises.

    Returns:
        Node id of each site that is registered.

    Raises:
        ConnectionFailed: the SuperLink refuses a key. It refuses a key that was removed once for good.
    """
    if not keys:
        return {}
    known = {n.key: n.id for n in _live(control.nodes())}
    for key, node_id in known.items():
        if whole and key not in keys.values():
            control.unregister(node_id)
    ids = {}
    for site, key in keys.items():
        try:
            ids[site] = known[key] if key in known else control.register(key)
        except FedLoRAError as e:
            if refused is None:
                raise
            refused(site, e)
    return ids


def nodes_by_site(control: Control, keys: Mapping[str, bytes]) -> dict[str, int]:
    """Node ids of the enrolled sites that are registered. Other nodes are left out."""
    known = {n.key: n.id for n in _live(control.nodes())}
    return {site: known[key] for site, key in keys.items() if key in known}


def start_job(control: Control, job: str) -> int:
    """Starts a run with the empty bundle. The sites see only one entry of its config: ``job``, a random number.

    Returns:
        Flower's id of the run.
    """
    bundle = bundle_bytes()
    return control.start_run(bundle, sha256=hashlib.sha256(bundle).hexdigest(), config={"job": job})
