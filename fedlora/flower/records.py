"""Requests and replies as Flower's records: one opaque blob in an array, and two or three names.

An array is cut into chunks, stored once and dropped by ``.numpy()`` users; a config record is one unchunked body. The
``stype`` is ours, so that nothing of Flower can mistake the blob for numbers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from fedlora.core.errors import Oversized, WireError
from fedlora.core.messages import Reply, Request
from fedlora.flower._internals import BROKEN, TOO_LARGE

STYPE = "fedlora.sealed.v1"

_FLOWER_ERRORS = {
    1: "site-process",
    2: "site-process",
    3: "message-unavailable",
    4: "reply-unavailable",
    5: "node-unavailable",
    7: "bundle-refused",
    8: "site-process",
    BROKEN: WireError.code,
    TOO_LARGE: Oversized.code,
}
_CODE = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")
_PHASE = re.compile(r"[a-z][a-z0-9-]{0,31}")


def safe_code(code: str) -> str:
    """``code`` if it has the form of an error code, else ``error``: no other text may leave a site."""
    return code if _CODE.fullmatch(code) else "error"


def flower_error(message: Message) -> str:
    """Our code for a message with one of Flower's errors. The error's text is dropped."""
    return _FLOWER_ERRORS.get(message.error.code, "flower")


def blob_of(body: bytes) -> Array:
    """A body as an array, which keeps the digests of its chunks: one for all sites to which the same body goes."""
    return Array(dtype="uint8", shape=(len(body),), stype=STYPE, data=body)


def _dump(blob: Array, names: Mapping[str, str]) -> RecordDict:
    return RecordDict({"fedlora": ConfigRecord(dict(names)), "body": ArrayRecord({"blob": blob})})


def dump_request(request: Request, blob: Array | None = None) -> RecordDict:
    """A request as records. ``blob``: of its body, if there is one already."""
    return _dump(blob or blob_of(request.body), {"site": request.site, "phase": request.phase})


def dump_reply(reply: Reply) -> RecordDict:
    """A reply as records. A reply with an error is sent without its body."""
    blob = blob_of(b"" if reply.error else reply.body)
    return _dump(blob, {"site": reply.site, "error": safe_code(reply.error) if reply.error else ""})


def _parse(content: RecordDict, keys: tuple[str, str], max_bytes: int) -> tuple[str, str, bytes]:
    names, arrays = content.get("fedlora"), content.get("body")
    if set(content) != {"fedlora", "body"} or not isinstance(names, ConfigRecord) or not isinstance(arrays, ArrayRecord):
        raise WireError("not a FedLoRA message")
    first, second = (names.get(k) for k in keys)
    if set(names) != set(keys) or not isinstance(first, str) or not isinstance(second, str):
        raise WireError("not the names of a FedLoRA message")
    blob = arrays.get("blob")
    if set(arrays) != {"blob"} or blob is None or blob.stype != STYPE or blob.dtype != "uint8":
        raise WireError("not one sealed blob")
    if len(blob.data) > max_bytes:
        raise Oversized(f"{len(blob.data)} bytes, at most {max_bytes} are taken")
    if tuple(blob.shape) != (len(blob.data),):
        raise WireError("the blob has not the length it states")
    return first, second, blob.data


def parse_request(content: RecordDict, *, max_bytes: int) -> Request:
    """Inverse of :func:`dump_request`. The body leaves the request with who opens it.

    Raises:
        WireError: not the records of a request.
        Oversized: more than ``max_bytes``.
    """
    site, phase, body = _parse(content, ("site", "phase"), max_bytes)
    if not _PHASE.fullmatch(phase):
        raise WireError("not a phase")
    return Request(site, phase, body, once=True)


def parse_reply(content: RecordDict, *, max_bytes: int) -> Reply:
    """Inverse of :func:`dump_reply`. The body leaves the reply with who opens it.

    Raises:
        WireError: not the records of a reply.
        Oversized: more than ``max_bytes``.
    """
    site, error, body = _parse(content, ("site", "error"), max_bytes)
    if error:
        return Reply(site, error=safe_code(error))
    return Reply(site, body, once=True)
