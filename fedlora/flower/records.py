"""Requests and replies as Flower's records: two names, and the body, opaque.

A small body stands beside the names, a large one in an array, which is cut into chunks. Each record, array and chunk is an object
that costs a call of each end and about 11 ms of the server's processor time: a small message is three objects instead of six. The
``stype`` is ours, so that nothing of Flower can mistake the blob for numbers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from fedlora.core.errors import Oversized, WireError
from fedlora.core.messages import Reply, Request
from fedlora.flower._internals import BROKEN, TOO_LARGE
from fedlora.flower.libraries import Array, ArrayRecord, ConfigRecord, Message, RecordDict

STYPE = "fedlora.sealed.v1"
SMALL_BYTES = 1 << 16
"""Longest body that stands beside the names."""

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


def blob_of(body: bytes) -> Array | None:
    """A large body as an array, which keeps its chunks' digests: one for all sites to which it goes. None if it is small."""
    return Array(dtype="uint8", shape=(len(body),), stype=STYPE, data=body) if len(body) > SMALL_BYTES else None


def _dump(names: Mapping[str, str], body: bytes, blob: Array | None) -> RecordDict:
    if blob is None:
        return RecordDict({"fedlora": ConfigRecord({**names, "body": bytes(body)})})
    return RecordDict({"fedlora": ConfigRecord(dict(names)), "body": ArrayRecord({"blob": blob})})


def dump_request(request: Request, blob: Array | None = None) -> RecordDict:
    """A request as records. ``blob``: of its body, if there is one already."""
    names = {"site": request.site, "phase": request.phase}
    return _dump(names, request.body, blob or blob_of(request.body))


def dump_reply(reply: Reply) -> RecordDict:
    """A reply as records. A reply with an error is sent without its body."""
    body = b"" if reply.error else reply.body
    names = {"site": reply.site, "error": safe_code(reply.error) if reply.error else ""}
    return _dump(names, body, blob_of(body))


def _parse(content: RecordDict, keys: tuple[str, str], max_bytes: int) -> tuple[str, str, bytes]:
    names, arrays = content.get("fedlora"), content.get("body")
    if not isinstance(names, ConfigRecord) or set(content) - {"fedlora", "body"}:
        raise WireError("not a FedLoRA message")
    first, second = (names.get(k) for k in keys)
    if not isinstance(first, str) or not isinstance(second, str):
        raise WireError("not the names of a FedLoRA message")
    if arrays is None and set(names) == {*keys, "body"}:
        body = names["body"]
    elif isinstance(arrays, ArrayRecord) and set(names) == set(keys):
        body = _body_of(arrays)
    else:
        raise WireError("not a FedLoRA message")
    if not isinstance(body, bytes) or (len(body) > SMALL_BYTES) != (arrays is not None):
        raise WireError("a body in the place of one of another length")
    if len(body) > max_bytes:
        raise Oversized(f"{len(body)} bytes, at most {max_bytes} are taken")
    return first, second, body


def _body_of(arrays: ArrayRecord) -> bytes:
    blob = arrays.get("blob")
    if set(arrays) != {"blob"} or blob is None or blob.stype != STYPE or blob.dtype != "uint8":
        raise WireError("not one sealed blob")
    if tuple(blob.shape) != (len(blob.data),):
        raise WireError("the blob has not the length it states")
    body: bytes = blob.data
    return body


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
