"""What a run's page says of the present: the run's step, and each site's, as `fedlora server status` has them."""

from __future__ import annotations

from contextlib import suppress
from datetime import UTC, datetime
from html import escape
from pathlib import Path

from fedlora.core.deployment.live import in_page
from fedlora.core.deployment.status import RunStatus, ServerStatus
from fedlora.core.errors import FedLoRAError, plain
from fedlora.flower.coordinator.look import look
from fedlora.formats.files import write_atomic

_EVERY_S = 5.0
_TEXT = ' class="text"'


def live_part(run: RunStatus, found: ServerStatus, *, now: float) -> str:
    """A section for the page of this run, HTML.

    Args:
        now: seconds since 1970.
    """
    at = datetime.fromtimestamp(now, UTC).strftime("%H:%M:%S UTC")
    said = f"<p><b>{_text(run['state'])}</b>: {_text(run['said'])}</p>"
    rows = "".join(
        f'<tr><th scope="row">{_text(site["site"])}</th><td class="text">{_text(site["standing"])}</td>'
        f'<td class="text">{_text(site["said"])}</td></tr>'
        for site in (found["sites"] if run["place"] == 1 else ())
    )
    head = "".join(f'<th scope="col"{kind}>{name}</th>' for name, kind in (("site", ""), ("is", _TEXT), ("that is", _TEXT)))
    table = (
        '<div class="scroll" tabindex="0" role="region" aria-label="Sites now"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )
    return f'<section><h2>Now</h2>{said}{table if rows else ""}<p class="soft">as of {at}</p></section>'


def _text(value: str) -> str:
    return escape(plain(value))


class Live:
    """Keeps that part of the pages of live runs up to date, and writes it once more when one has ended.

    Args:
        home: the server's directory.
    """

    def __init__(self, home: Path) -> None:
        self._home = home
        self._next, self._open = 0.0, set[str]()

    def look(self, now: float) -> None:
        """To be called about once a second."""
        if now < self._next:
            return
        self._next = now + _EVERY_S
        with suppress(FedLoRAError, OSError):  # of the next look; who reads a status is told what is wrong
            found = look(self._home, now=now)
            names = {run["name"] for run in found["runs"] if run["place"]}
            for run in found["runs"]:
                if run["name"] in names | self._open:
                    self._write(run, found, now=now)
            self._open = names

    def _write(self, run: RunStatus, found: ServerStatus, *, now: float) -> None:
        page = self._home / "runs" / run["name"] / "report.html"
        if not page.is_file():
            return
        before = page.read_text("utf-8")
        after = in_page(before, live_part(run, found, now=now))
        if after != before:
            write_atomic(page, after.encode(), mode=0o644, shared=True)
