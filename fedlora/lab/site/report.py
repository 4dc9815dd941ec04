"""A site's own page: its rounds, its losses, and what left, from its outbox and its history. Nothing of any row is in either."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fedlora.core.errors import NotInstalled, StoreError
from fedlora.core.sites.standing import STANDINGS
from fedlora.core.words import number, percent, size
from fedlora.formats.files import Damaged
from fedlora.formats.state import history, outbox
from fedlora.formats.state.memory import FileMemory
from fedlora.site.parts import load_site_key
from fedlora.site.progress import load_state
from fedlora.site.site_file import load_site_file


@dataclass(frozen=True, slots=True)
class Done:
    """What a site has done.

    Attributes:
        standing: of the site, in words; empty: no `site up` has run.
        left: every message that has left; empty if ``damage`` says that the list is not as this site wrote it.
        codes: error code -> how often it left instead of one, and when the last time.
        answered: run -> round -> the round as this site did it, the last time that it did.
        running: `site up` runs.
    """

    site: str
    server: str
    standing: str
    left: Sequence[outbox.Left]
    codes: Mapping[str, tuple[int, int]]
    damage: str
    answered: Mapping[str, Mapping[int, history.Answered]]
    running: bool

    def runs(self) -> list[str]:
        """Ids, the one of which something left last first."""
        last = {m.run: m.at for m in self.left if m.run}
        for run, rounds in self.answered.items():
            last[run] = max(last.get(run, 0), *(a.at for a in rounds.values()))
        return sorted(last, key=lambda run: -last[run])


def load(site_file: Path) -> Done:
    """Reads what a site keeps. Changes nothing.

    Raises:
        StoreError: it has answered nothing yet.
        ConfigError, KeyFileError: the site file or its key is wrong.
    """
    file, root = load_site_file(site_file), site_file.resolve().parent
    state, damage = root / file.state, ""
    left: list[outbox.Left] = []
    codes: dict[str, tuple[int, int]] = {}
    try:
        memory = FileMemory(state / "memory")
        left = outbox.read_outbox(state / outbox.NAME, memory, load_site_key(file, root).public)
        codes = outbox.read_codes(memory)
    except Damaged as e:
        damage = str(e)
    answered: dict[str, dict[int, history.Answered]] = {}
    for one in history.read_history(state / history.NAME):
        known = answered.setdefault(one.run, {})
        if one.kind != "journal" or one.round not in known:
            known[one.round] = one
    if not left and not codes and not answered and not damage:
        raise StoreError(f"nothing has left this site yet: {state} holds no outbox", hint=f"fedlora site up {site_file}")
    now = load_state(state)
    standing = "" if now is None else f"{now['standing']}: {now['why'] or STANDINGS.get(now['standing'], '')}"  # type: ignore[call-overload]
    return Done(file.name, file.server, standing, left, codes, damage, answered, bool(now and now["running"]))


def write_page(site_file: Path, page: Path, *, figures: Path | None = None) -> list[Path]:
    """Writes one self-contained page for this user alone (mode 600): no script, no network.

    Args:
        figures: directory for each figure as PDF and as PNG; None: none is written.

    Returns:
        The files of the figures.

    Raises:
        StoreError, ConfigError, KeyFileError: as :func:`load`.
        NotInstalled: it needs ``fedlora[report]``.
    """
    shown = contents(load(site_file))
    from fedlora.lab.page import document

    document.write_page(shown, page, mode=0o600)
    return document.write_figures(shown, figures)


def contents(done: Done) -> dict[str, Any]:
    """All that ``page.document.document`` shows of a site.

    Raises:
        NotInstalled: it needs ``fedlora[report]``.
    """
    try:
        from fedlora.lab.page.document import Section
    except ImportError as e:
        raise NotInstalled(e.name or "", extra="report", what="the page and its figures") from None
    whole = done.damage or f"the list of what left is whole and signed by this site's key: {len(done.left)} messages"
    runs = done.runs()
    sections = [_run(done, run) for run in runs] or [Section("Rounds", notes=["No round has been answered yet."])]
    return {
        "title": f"{done.site}: what this site has done",
        "heading": done.site,
        "lead": f"{done.standing or 'no site up has run'} · {whole}",
        "tiles": _tiles(done, runs),
        "sections": [*sections, _codes(done)],
        "facts": {"Site": [("server", done.server), ("runs", str(len(runs))), ("FedLoRA", version("fedlora"))]},
        "goes_on": done.running,
    }


def _tiles(done: Done, runs: Sequence[str]) -> list[tuple[str, str, str]]:
    rounds = done.answered.get(runs[0], {}) if runs else {}
    trained = [a for a in rounds.values() if a.kind != "evaluate"]
    codes = Counter(m.code for m in done.left if m.code) + Counter({code: n for code, (n, _) in done.codes.items()})
    wrong = "error codes sent: " + (", ".join(f"{code} {n}" for code, n in codes.most_common()) or "none")
    tiles = []
    if trained:
        over = any(a.kind == "evaluate" for a in rounds.values())
        of = f" of {all_}" if (all_ := max(a.rounds for a in rounds.values())) else ""
        tiles.append(
            (
                "Rounds of the last run",
                f"{len(trained)}{of}",
                f"{'the last evaluation is done' if over else 'it goes on'}; {wrong}",
            )
        )
    for key, name, words in (("eval/nll", "Own held-out loss", number), ("eval/exact_match", "Own exact match", percent)):
        if known := {r: a.held_out[key] for r, a in sorted(rounds.items()) if key in a.held_out}:
            first, last = min(known), max(known)
            began = "the base" if first == 1 else f"after {first - 1} rounds"
            now = "the final adapter" if rounds[last].kind == "evaluate" else f"after {last - 1} rounds"
            unit = "nats per token; " if key == "eval/nll" else ""
            tiles.append((name, words(known[last]), f"{unit}{now}; {began}: {words(known[first])}"))
    total = sum(m.size_bytes for m in done.left)
    tiles.append(("Left this site", size(total), f"{len(done.left)} messages in all runs, each with its SHA-256 in the outbox"))
    return tiles


def _run(done: Done, run: str) -> Any:
    from fedlora.lab.page.document import Section
    from fedlora.lab.page.figures import Table, lines

    rounds = done.answered.get(run, {})
    key = f"run-{run[:12]}"
    trained = {r: a for r, a in sorted(rounds.items()) if a.before is not None}
    own: dict[str, list[tuple[int, float | None]]] = {
        "first step": [(r, a.before) for r, a in trained.items()],
        "last step": [(r, a.after) for r, a in trained.items()],
    }
    held = [(r - 1, a.held_out["eval/nll"]) for r, a in sorted(rounds.items()) if "eval/nll" in a.held_out]
    began, after = (
        "In a round's first and last step.",
        "After each number of rounds; 0 is the base.",
    )
    drawn = [
        lines(f"{key}-loss", "Own training loss", began, own, unit="nats per token") if trained else None,
        lines(f"{key}-held-out", "Own held-out loss", after, {"held out": held}, unit="nats per token", across="rounds done")
        if held
        else None,
    ]
    sent: dict[int, list[outbox.Left]] = {}
    for message in done.left:
        if message.run == run:
            sent.setdefault(message.round, []).append(message)
    rows = [_row(r, rounds.get(r), sent.get(r, [])) for r in sorted({*rounds, *sent} - {0})]
    note = (
        "Round by round, of this site alone. Held-out numbers are of the adapter that a round began with. Bytes are of all "
        "messages of the round; the SHA-256 is that of the message with what the round made."
    )
    head = [
        "round", "left, UTC", "loss, first step", "last step", "held-out loss", "exact match", "seconds", "messages", "bytes",
        "SHA-256",
    ]  # fmt: skip
    return Section(f"Run {run[:12]}", drawn, [Table(note, head, rows)])


def _row(round: int, found: history.Answered | None, sent: Sequence[outbox.Left]) -> list[str]:
    at = max([m.at for m in sent] or [found.at if found else 0])
    last = [m for m in sent if not m.code][-1:]
    digest = found.sha256 if found is not None else last[0].sha256 if last else "-"
    name = "last evaluation" if found is not None and found.kind == "evaluate" else str(round)
    known = found.held_out if found is not None else {}
    losses = (None, None) if found is None else (found.before, found.after)
    spent = "-" if found is None or found.kind == "journal" else f"{found.seconds:.1f}"
    return [
        name,
        datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M"),
        *map(number, losses),
        number(known.get("eval/nll")),
        percent(known.get("eval/exact_match")),
        spent,
        str(len(sent) or "-"),
        size(sum(m.size_bytes for m in sent) if sent else found.size_bytes if found else None),
        digest[:16],
    ]


def _codes(done: Done) -> Any:
    from fedlora.lab.page.document import Section
    from fedlora.lab.page.figures import Table

    old = [(m.code, 1, m.at) for m in done.left if m.code]
    new = [(code, count, at) for code, (count, at) in done.codes.items()]
    rows = [[code, str(n), datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M")] for code, n, at in (*new, *old)]
    note = "Answers that were an error code and nothing else; `fedlora explain CODE` says what each means."
    return Section("Tasks that were not done", (), [Table(note, ["code", "times", "last, UTC"], rows)])
