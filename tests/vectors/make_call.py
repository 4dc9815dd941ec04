"""Writes ``call.json``, one signed call of a site (FORMAT 5.9), if it is not there: `python tests/vectors/make_call.py`."""

from __future__ import annotations

import json
import sys
import tempfile
from datetime import datetime
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from flower.signed import Node  # noqa: E402  beside this folder

from fedlora.gateway.calls import TIME  # noqa: E402
from fedlora.gateway.certificates import authority_digest, make_tls  # noqa: E402

METHOD, PATH, BODY = "POST", "/v1/fleet/push-object", "body"


def make() -> dict[str, object]:
    with tempfile.TemporaryDirectory() as place:
        home = Path(place)
        (home / "sites").mkdir()
        make_tls(home / "tls", [])
        node = Node(home, "alpha", home=home)
        headers = node.headers(PATH, BODY.encode(), nonce=bytes(range(16)))
        headers.pop("content-type")
        return {
            "why": "FORMAT 5.9: the gateway takes this call once, within its window of the time stamp; one other byte of "
            "authority, method, path, body, stamp or nonce and it does not",
            "now": int(datetime.fromisoformat(headers[TIME]).timestamp()) + 1,
            "authority": authority_digest(home / "tls" / "ca.crt"),
            "method": METHOD,
            "path": PATH,
            "body": BODY,
            "pub": (home / "sites" / "alpha.pub").read_text(),
            "headers": headers,
        }


if __name__ == "__main__":
    if not (HERE / "call.json").exists():
        (HERE / "call.json").write_text(json.dumps(make(), indent=2) + "\n")
