"""The parts of one of Flower's messages: written out, counted and put together again a few at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from flwr.app import Array
from flwr.proto import message_pb2
from flwr.supercore.inflatable import inflatable_object, inflatable_utils
from numpy.typing import NDArray

from fedlora.core.errors import Oversized, WireError
from fedlora.formats.values import fill
from fedlora.gateway.replies import CHUNK_BYTES

_STRAGGLING_PART_S = 10.0
_BATCH = 2  # parts of a message that are pulled or pushed at a time


def count_parts(tree: Any) -> int:
    """Number of objects of a message, equal ones counted once."""
    return len({node.object_id for node in inflatable_object.iterate_object_tree(tree)})


def tree_of(object_id: str, part: Any, objects: dict[str, Any]) -> Any:
    """Flower's tree of a message; fills ``objects``, children before parents. Flower's own would hash every chunk anew."""
    children = [tree_of(i, child, objects) for i, child in (part.children or {}).items()]
    objects[object_id] = part
    return message_pb2.ObjectTree(object_id=object_id, children=children)


def batches(ids: Sequence[str]) -> Iterator[Sequence[str]]:
    """A few at a time: what is on its way is held twice."""
    return (ids[at : at + _BATCH] for at in range(0, len(ids), _BATCH))


def pull_some(ids: Sequence[str], pull: Callable[[str], bytes]) -> dict[str, bytes]:
    found: dict[str, bytes] = inflatable_utils.pull_objects(list(ids), pull, max_time=_STRAGGLING_PART_S)
    return found


def kind_of(part: bytes) -> str:
    return str(inflatable_object.get_object_head_values_from_object_content(part)[0])


def children_of(part: bytes) -> list[str]:
    return list(inflatable_object.get_object_head_values_from_object_content(part)[1])


def unfold_array(head: bytes, pull: Callable[[Sequence[str]], Mapping[str, bytes]]) -> Array:
    """An array, filled in place: Flower's own way holds it three times.

    Args:
        head: its part of the message; states its size, which was compared with what is due, and names its chunks.
        pull: gives a few chunks by their ids.

    Raises:
        Oversized: the chunks are more than it states, or more in number than Flower cuts of so many bytes: it may name the same
            one a million times, an empty one too, and each is pulled.
        WireError: they are less.
    """
    table, names = json.loads(head[head.index(b"\x00") + 1 :]), children_of(head)
    size = math.prod(table["shape"])
    if len(table["arraychunk_ids"]) > max(-(-size // CHUNK_BYTES), 1):
        raise Oversized(f"an array of {len(table['arraychunk_ids'])} chunks, more than its {size} bytes make")

    def write(out: NDArray[np.uint8]) -> None:
        at = 0
        for some in batches([names[i] for i in table["arraychunk_ids"]]):
            found = pull(list(dict.fromkeys(some)))
            for name in some:
                body = memoryview(found[name])[found[name].index(b"\x00") + 1 :]
                if at + len(body) > size:
                    raise Oversized(f"an array that unfolds to more than the {size} bytes that it states")
                out[at : at + len(body)] = np.frombuffer(body, np.uint8)
                at += len(body)
        if at != size:
            raise WireError(f"an array of {at} bytes that states {size}")

    return Array(table["dtype"], tuple(table["shape"]), table["stype"], fill(size, write))


def check_stated(parts: Mapping[str, bytes], max_bytes: int) -> None:
    """Checks the sum of the lengths that arrays state, before their chunks are pulled.

    Raises:
        Oversized: more than ``max_bytes`` together.
        WireError: one states less than nothing.
    """
    heads = (p for p in parts.values() if inflatable_object.get_object_head_values_from_object_content(p)[0] == "Array")
    sizes = [math.prod(json.loads(p[p.index(b"\x00") + 1 :])["shape"]) for p in heads]
    if min(sizes, default=0) < 0:
        raise WireError("an array of a negative size")
    if (total := sum(sizes)) > max_bytes:
        raise Oversized(f"a message that states {total} bytes, at most {max_bytes} are due")
