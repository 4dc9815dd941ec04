"""The call by which a site announces its reply to the relay (``push-messages``), checked before the SuperLink hears of it.

Flower's relay takes from a registered node what it likes: messages that name the server as their sender, and trees of any number
of objects, each of which is several rows of its database, all written in one transaction. Here an announcement is one reply of
the node that calls, with the tree of that reply. That the node's number belongs to the key is Flower's own check.

It also takes an object's id with the children that whoever names it first says it has. One body that goes to several sites is the
same objects for all: so that no site can name them, the gateway notes their ids from the answers to ``pull-messages``, before the
site has them, and takes no announcement with one of them.

The body is Protocol Buffers (``flwr/proto/fleet.proto``, ``message.proto``). It is read here by hand and strictly, so that what
passes has one meaning only: a field that is not known is refused, and so is one that says who or what and comes twice, since
Flower would merge the two.
``tests/flower/test_contract.py`` compares the fields with Flower's.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Collection, Mapping
from itertools import chain
from typing import Final, NamedTuple

from fedlora.core.errors import WireError
from fedlora.core.reader import Reader
from fedlora.gateway.bodies import Stop

CHUNK_BYTES: Final = 5 << 20
"""Flower cuts an array into chunks of this size."""
_OTHER_PARTS = 8  # message, records, names, array: five, and what Flower may add
_HEAD_BYTES = 1 << 12  # of an announcement without its tree: a true one has 300
_PART_BYTES = 80  # and for each part of its tree: a true one has 72

_NUMBER, _DOUBLE, _BYTES = 0, 1, 2  # wire types
_DOUBLE_LE = struct.Struct("<d")
_MOST_SECONDS = 1e10  # since 1970: in the year 2286


class Field(NamedTuple):
    """A field of a message: its name, and the wire types that it may have."""

    name: str
    kinds: tuple[int, ...]


REQUEST: Final = {
    1: Field("node", (_BYTES,)),
    2: Field("messages_list", (_BYTES,)),
    3: Field("message_object_trees", (_BYTES,)),
    4: Field("clientapp_runtime_list", (_DOUBLE, _BYTES)),
}
PULLED: Final = {
    1: Field("reconnect", (_BYTES,)),
    2: Field("messages_list", (_BYTES,)),
    3: Field("message_object_trees", (_BYTES,)),
}
NODE: Final = {1: Field("node_id", (_NUMBER,))}
MESSAGE: Final = {1: Field("metadata", (_BYTES,)), 2: Field("content", (_BYTES,)), 3: Field("error", (_BYTES,))}
METADATA: Final = {
    1: Field("run_id", (_NUMBER,)),
    2: Field("message_id", (_BYTES,)),
    3: Field("src_node_id", (_NUMBER,)),
    4: Field("dst_node_id", (_NUMBER,)),
    5: Field("reply_to_message_id", (_BYTES,)),
    6: Field("group_id", (_BYTES,)),
    7: Field("ttl", (_DOUBLE,)),
    8: Field("message_type", (_BYTES,)),
    9: Field("created_at", (_DOUBLE,)),
    10: Field("src_task_id", (_NUMBER,)),
    11: Field("dst_task_id", (_NUMBER,)),
}
TREE: Final = {1: Field("object_id", (_BYTES,)), 2: Field("children", (_BYTES,))}
SERVER: Final = (1).to_bytes(8)
"""The server's number as a node."""

_DEEPEST = 16  # trees in trees; a true one has five: message, records, arrays, array, chunks
_OWN = 3  # of them, the levels that differ from message to message by a random number, if nothing is in them
_ID = re.compile(rb"[0-9a-f]{64}")


class _Part(NamedTuple):
    depth: int
    id: bytes
    has_children: bool


def most_parts(size_bytes: int) -> int:
    """Number of objects that a message with a body of this many bytes may have."""
    return _OTHER_PARTS + max(-(-size_bytes // CHUNK_BYTES), 1)


def most_bytes(parts: int) -> int:
    """Length of an announcement of a message with this many parts."""
    return _HEAD_BYTES + _PART_BYTES * parts


def shared_ids(body: bytes) -> set[bytes] | None:
    """Ids of the objects that the requests in an answer to ``pull-messages`` may share with those to other sites.

    A request's first two levels and its record of names have a random number in them; its array of a large body, and what is in
    that, follow from the body alone.

    Returns:
        Each 64 hexadecimal digits; one for each 5 MiB of a body and two more, none for a body beside the names. None: there is no
        request in it.

    Raises:
        WireError: not such an answer.
    """
    pulled = _read(body, PULLED)
    if not pulled.get("messages_list") and not pulled.get("message_object_trees"):
        return None
    parts = chain.from_iterable(_parts(tree) for tree in pulled.get("message_object_trees", []))
    return {part.id for part in parts if part.depth > _OWN or (part.depth == _OWN and part.has_children)}


def check_announcement(body: bytes, *, most_parts: int, sent: Collection[bytes]) -> None:
    """Checks that this is one reply of the node that calls, to the server, with its own tree.

    Args:
        body: of a call to ``push-messages``.
        sent: ids that no reply may have (:func:`shared_ids`).

    Raises:
        Stop: 400, it is something else; 413, its tree has more than ``most_parts`` parts.
    """
    try:
        request = _read(body, REQUEST)
        tree = _only(request, "message_object_trees")
        parts = _parts(tree)
        node = _only(_read(_only(request, "node"), NODE), "node_id")
        message = _read(_only(request, "messages_list"), MESSAGE)
        metadata = _read(_only(message, "metadata"), METADATA)
        if (_only(metadata, "src_node_id"), _only(metadata, "dst_node_id")) != (node, SERVER):
            raise WireError("a message in another's name, or to another than the server")
        if not _only(metadata, "reply_to_message_id"):
            raise WireError("a message that replies to none")
        if parts[0].id != _only(metadata, "message_id"):
            raise WireError("the tree of another message")
        if any(message.get("content", [])):
            raise WireError("a message with its content in it")
        for name, lists in (("clientapp_runtime_list", request), ("ttl", metadata), ("created_at", metadata)):
            if not 0 <= _DOUBLE_LE.unpack(_only(lists, name, size=_DOUBLE_LE.size))[0] < _MOST_SECONDS:  # nor is it NaN
                raise WireError(f"a {name} that is no time")
        if any(part.id in sent for part in parts):
            raise WireError("a part of what the server has sent")
    except WireError as e:
        raise Stop(400, f"not the announcement of a reply: {e}") from None
    if len(parts) > most_parts:
        raise Stop(413, f"a reply of {len(parts)} parts, at most {most_parts} are due")


def _parts(tree: bytes, depth: int = 1) -> list[_Part]:
    """A tree's parts, its root first. Flower stores a row for an announcement before it finds what is refused here."""
    if depth > _DEEPEST:
        raise WireError("a tree that is too deep")
    fields = _read(tree, TREE)
    root, below = _only(fields, "object_id"), [_parts(child, depth + 1) for child in fields.get("children", [])]
    if not _ID.fullmatch(root):
        raise WireError("a part whose id is no digest")
    if len({parts[0].id for parts in below}) != len(below):
        raise WireError("a part that has another one twice")
    return [_Part(depth, root, bool(below)), *chain.from_iterable(below)]


def _only(fields: Mapping[str, list[bytes]], name: str, *, size: int | None = None) -> bytes:
    found = fields.get(name, [])
    if len(found) != 1 or (size is not None and len(found[0]) != size):
        raise WireError(f"{len(found)} of {name}, one is needed")
    return found[0]


def _read(message: bytes, fields: Mapping[int, Field]) -> dict[str, list[bytes]]:
    """The values of a message's fields by name, a number as eight bytes."""
    found: dict[str, list[bytes]] = {}
    reader = Reader(message, "a message")
    while reader.left:
        number, kind = divmod(_varint(reader), 8)
        field = fields.get(number)
        if field is None or kind not in field.kinds:
            raise WireError(f"no field {number} of wire type {kind} is known")
        value = _varint(reader).to_bytes(8) if kind == _NUMBER else reader.take(8 if kind == _DOUBLE else _varint(reader))
        found.setdefault(field.name, []).append(value)
    return found


def _varint(reader: Reader) -> int:
    value, shift, more = 0, 0, True
    while more:
        byte = reader.number(1)
        value, shift, more = value | (byte & 0x7F) << shift, shift + 7, byte >= 0x80
        if shift > 70 or value >> 64:
            raise WireError("a number of more than 64 bits")
    return value
