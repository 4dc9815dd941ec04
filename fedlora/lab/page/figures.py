"""Figures for the page and for papers: Vega-Lite charts, drawn by vl-convert without a network.

Every figure carries the table of its numbers and a text for readers who do not see it. What is not a finite number is left
out. The same data give the same bytes. Names come from plans that somebody else wrote: they are data of a chart, never a
field, an expression or markup.

A chart is written down as Vega-Lite has it: Altair made the same charts, in nearly twice the time that drawing them takes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeAlias

import vl_convert

from fedlora.core.errors import plain
from fedlora.core.records import RoundRecord
from fedlora.core.words import TOGETHER, number, percent, state
from fedlora.formats.files import write_atomic

COLORS: Final = {
    "paper": ("#fcfcfa", "#14171a"),
    "card": ("#ffffff", "#1b1f23"),
    "ink": ("#1c2126", "#e6e8ea"),
    "soft": ("#5c6670", "#9aa4ad"),
    "rule": ("#e2e4e3", "#30363c"),
    "warn": ("#b34700", "#ff9d5c"),
    "blue": ("#0072b2", "#3f9ae8"),
}
"""Colors by use: (light, dark). Figures are drawn light; the page's style sheet turns them dark."""
CARD, INK, SOFT, RULE, WARN = (COLORS[use][0] for use in ("card", "ink", "soft", "rule", "warn"))
PALETTE: Final = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8b949c")
"""Okabe and Ito's colors, which the color-blind can tell apart, and a gray. Lines and stacks use the first six in turn."""
_WIDTH = 400  # units of every figure; four fifths of a pixel each on a telephone, so that 12-unit text can be read there
_LINE = 15  # height of a bar with its gap
_FONT = "Liberation Sans, Arial, Helvetica, sans-serif"
_CONFIG = {
    "aria": False,
    "background": None,
    "font": _FONT,
    "view": {"stroke": None},
    "axis": {
        "domain": False,
        "ticks": False,
        "gridColor": RULE,
        "titleColor": SOFT,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
        "labelColor": SOFT,
        "labelFontSize": 12,
        "labelPadding": 7,
    },
    "axisX": {"titleAnchor": "end", "titlePadding": 4},
    "axisY": {"titleAngle": 0, "titleAlign": "left", "titleAnchor": "end", "titleX": 0, "titleY": -9},
    "legend": {"orient": "bottom", "labelColor": INK, "labelFontSize": 12, "rowPadding": 5, "columnPadding": 18, "offset": 16},
    "text": {"color": INK, "fontSize": 12},
}
_STATES = {"counted": ("#0072b2", "#0072b2"), "late": ("#e69f00", "#e69f00"), "rejected": ("#d55e00", "#d55e00")}
_STATES |= {"not asked": (CARD, SOFT)}  # fill, stroke
_NOT_ASKED = ("offline", "not-drawn")
_SIGNS = {"late": "L", "rejected": "R"}
_SCHEMA = "https://vega.github.io/schema/vega-lite/v6.4.1.json"  # says the version; nothing is loaded from there


Drawing: TypeAlias = Mapping[str, Any]
"""A chart of layers, and every other part of one."""


@dataclass(frozen=True, slots=True)
class Table:
    """Cells are plain text. ``main``: the first cell of the row to stress; ``words``: what the columns' names mean."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    main: str = ""
    words: Mapping[str, str] = field(default_factory=dict)

    @property
    def texts(self) -> set[int]:
        """The columns whose cells are sentences."""
        return {i for row in self.rows for i, cell in enumerate(row) if i and len(cell) > 24}


@dataclass(frozen=True, slots=True)
class Figure:
    """A chart, the numbers in it, and what it shows in words.

    Attributes:
        key: name of its files; what is not a-z, 0-9 or ``-`` becomes ``-``.
        words: what the chart shows, for those who do not see it.
        legend: name -> color, dash and opacity of its line or bar; the page has it as text that can wrap.
        shown: the table is open from the start.
    """

    key: str
    title: str
    note: str
    words: str
    chart: Drawing
    table: Table
    legend: Mapping[str, tuple[str, str, float]] = field(default_factory=dict)
    shown: bool = False

    def svg(self) -> str:
        """The drawing for a page: transparent, no legend, no style attribute, a ``title`` for each mark."""
        layers = [{**layer, "encoding": {k: _bare(c) for k, c in layer["encoding"].items()}} for layer in self.chart["layer"]]
        drawn: str = vl_convert.vegalite_to_svg({**self.chart, "layer": layers}, config=_CONFIG, allowed_base_urls=[])
        mark = r'<path aria-label="([^"]*)" role="graphics-symbol" aria-roledescription="[^"]*"([^>]*)/>'
        inline = re.sub(r' xmlns(:xlink)?="[^"]*"', "", drawn, count=2)  # HTML needs no namespaces
        return re.sub(mark, r"<path\2><title>\1</title></path>", inline)

    def save(self, directory: Path) -> list[Path]:
        """Writes KEY.pdf and KEY.png (300 pixels an inch at 11 cm) on white, with the title, in one weight of the font.

        Raises:
            StoreError, ResourceError: a file cannot be written.
        """
        title = {"text": self.title, "anchor": "start", "fontSize": 14, "color": INK}
        spec = {**self.chart, "title": title, "background": "#ffffff", "padding": 8}
        drawn = re.sub(r' font-weight="[^"]*"', "", vl_convert.vegalite_to_svg(spec, config=_CONFIG, allowed_base_urls=[]))
        found = {"pdf": _ordered(vl_convert.svg_to_pdf(drawn)), "png": vl_convert.svg_to_png(drawn, scale=3)}
        name = re.sub(r"[^a-z0-9-]+", "-", self.key)
        for kind, blob in found.items():
            write_atomic(directory / f"{name}.{kind}", blob, mode=0o644)
        return [directory / f"{name}.{kind}" for kind in found]


def _ordered(pdf: bytes) -> bytes:
    """The same PDF, the entries of each resource dictionary in order: its writer takes them, and fonts, from a hash table."""
    entries = rb"(?:\n +/[a-zA-Z]+[0-9]+ [0-9]+ 0 R)+"
    return re.sub(entries, lambda found: b"\n" + b"\n".join(sorted(found[0][1:].split(b"\n"))), pdf)


def _bare(channel: Drawing) -> Drawing:
    return {**channel, "legend": None} if "legend" in channel else channel


def _layers(*layers: Drawing, height: float, left: float = 0) -> Drawing:
    fit = {"type": "fit-x", "contains": "padding"}
    padding = {"left": left, "right": 0, "top": 0, "bottom": 0}
    return {"$schema": _SCHEMA, "width": _WIDTH, "height": height, "padding": padding, "autosize": fit, "layer": layers}


def _layer(rows: Sequence[Mapping[str, Any]], mark: str, look: Drawing, **encoding: Drawing) -> Drawing:
    """One kind of mark: a mark a row. The order of channels is that of the alphabet, whoever asks."""
    channels = {name: encoding[name] for name in sorted(encoding)}
    return {"data": {"values": list(rows)}, "mark": {"type": mark, **look}, "encoding": channels}


_KINDS = {"Q": "quantitative", "O": "ordinal", "N": "nominal"}


def _of(shorthand: str, **more: Any) -> Drawing:
    """A channel of a field: ``name:N``."""
    name, _, kind = shorthand.partition(":")
    return {"field": name, "type": _KINDS[kind], **more}


def _legend(names: Sequence[str], **more: Any) -> Drawing | None:
    """In as many columns as the longest name allows; None for a single name."""
    columns = max(1, int(_WIDTH / (6.2 * max(map(len, names)) + 32)))
    return {"title": None, "columns": columns, "labelLimit": _WIDTH - 40, **more} if len(names) > 1 else None


def _scale(names: Sequence[str], values: Sequence[Any]) -> Drawing:
    return {"type": "ordinal", "domain": list(names), "range": list(values)}


def _turns(n: int, values: Sequence[Any]) -> list[Any]:
    """A value for each of ``n``: the next one when all six colors are used up."""
    return [values[i // 6 % 3] for i in range(n)]


def _decades(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten within; fewer where they are many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [tick for power in powers for tick in (10.0**power, 2 * 10.0**power, 5 * 10.0**power) if low <= tick <= high * 1.15]
    return ticks[:: len(ticks) // 9 + 1]


def lines(
    key: str,
    title: str,
    note: str,
    series: Mapping[str, Sequence[tuple[int, float | None]]],
    *,
    unit: str,
    across: str = "round",
    colors: Sequence[str] = (),
) -> Figure | None:
    """Lines over round numbers, broken where a value is missing; logarithmic where values span more than a factor of six.

    That of all together lies under the others, wide and pale.

    Args:
        series: name -> (round, value), ...; the same rounds for each.
        unit: of the values, as it stands above their axis.
        across: what the other axis counts.
        colors: of each line; default: six in turn, then the same dashed, then dotted.
    """
    known = [y for points in series.values() for _, y in points if y is not None]
    if not known:
        return None
    low, high = min(known), max(known)
    log = low > 0 and high / low > 6
    room = (high - low) * 0.08 or abs(high) * 0.1 or 1.0
    bottom = low * 0.85 if log else 0.0 if 0 <= low <= 0.5 * high else low - room
    names = list(series)
    plots = [n for n in names if n != TOGETHER or len(names) == 1]
    hues = colors or [PALETTE[i % 6] for i in range(len(plots))]
    dashes = _turns(len(plots), ([1, 0], [6, 3], [2, 3]))
    pens = dict(zip(plots, zip(hues, dashes, [1.8] * len(plots), [1.0] * len(plots), strict=True), strict=True))
    pens.setdefault(TOGETHER, (INK, [1, 0], 5.0, 0.3))
    hue, dash, width, opacity = ([pens[n][i] for n in names] for i in range(4))
    legend = _legend(names, symbolType="stroke", symbolSize=300)
    rows = [{"name": n, "x": x, "y": y, "tip": f"{n}, {x}: {number(y)}"} for n in names for x, y in series[n]]
    xs = [x for points in series.values() for x, _ in points]
    axis = {"title": across, "grid": False, "format": "d", "tickMinStep": 1, "tickCount": 8}
    x = _of("x:Q", scale={"domain": [min(xs) - 0.3, max(xs) + 0.3], "nice": False}, axis=axis)
    scale = {"type": "log" if log else "linear", "domain": [bottom, high * 1.15 if log else high + room]}
    ticks = {"values": _decades(bottom, high)} if log else {"tickCount": 5}
    y = _of("y:Q", scale=scale, axis={"title": unit, "format": ".4~g", **ticks})
    drawn = {"color": hue, "strokeDash": dash, "strokeWidth": width, "opacity": opacity}
    pen = {channel: _of("name:N", scale=_scale(names, values), legend=legend) for channel, values in drawn.items()}
    line = _layer(rows, "line", {"invalid": "break-paths-filter-domains", "strokeJoin": "round"}, x=x, y=y, **pen)
    shown = [r for r in rows if r["y"] is not None and r["name"] in plots]
    look, tip = {"size": 22, "opacity": 1, "aria": True}, _of("tip:N")
    dots = _layer(shown, "circle", look, x=x, y=y, color=_bare(pen["color"]), description=tip)
    ends = [(n, [(x, v) for x, v in series[n] if v is not None]) for n in names]
    told = [f"{n} from {number(p[0][1])} at {p[0][0]} to {number(p[-1][1])} at {p[-1][0]}" for n, p in ends if p]
    more = f"; and {len(told) - 6} more" if len(told) > 6 else ""
    table = Table(title, [across, *names], [[str(x), *(number(dict(series[n]).get(x)) for n in names)] for x in sorted(set(xs))])
    words = f"{title}: {counted(len(told), 'line')}. {'; '.join(told[:6])}{more}."
    keys = {n: (pens[n][0], " ".join(map(str, pens[n][1])), pens[n][3]) for n in names} if len(names) > 1 else {}
    return Figure(key, title, note + " Logarithmic scale." * log, words, _layers(line, dots, height=200), table, keys)


def counted(n: int, noun: str) -> str:
    """A number with its noun, in the plural where it needs one."""
    return f"{n} {noun}{'' if n == 1 else 's'}"


@dataclass(frozen=True, slots=True)
class Bar:
    """``spread``: least and greatest over seeds, drawn as a whisker."""

    name: str
    color: str
    value: float
    text: str
    spread: tuple[float, float] | None = None


def _named(unit: str) -> Drawing:
    """An axis of which the title alone is drawn: each bar has its number beside it."""
    return {"title": unit, "labels": False, "ticks": False, "grid": False, "domain": False}


def bars(key: str, title: str, note: str, groups: Sequence[tuple[str, str, Sequence[Bar]]], *, unit: str) -> Figure | None:
    """Horizontal bars from zero in groups of (name, mark, bars), so that any number of sites can be read on a telephone."""
    each = [(name, b) for name, _, group in groups for b in group]
    top = max([v for _, b in each for v in (b.value, *(b.spread or ()))], default=0.0)
    if top <= 0:
        return None
    heads: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    line = 0
    for name, mark, group in groups:
        heads.append({"line": line, "name": name, "mark": mark})
        for b in group:
            line += 1
            low, high = b.spread if b.spread and b.spread[0] < b.spread[1] else (b.value, b.value)
            row = {"line": line, "name": b.name, "value": max(b.value, 0.0), "low": max(low, 0.0), "high": max(high, 0.0)}
            rows.append({**row, "end": max(b.value, high, 0.0), "text": b.text, "tip": f"{name}, {b.name}: {b.text}"})
        line += 2
    colors = {b.name: b.color for _, b in each}
    y = _of("line:O", axis=None, scale={"domain": list(range(line - 1)), "paddingInner": 0.27, "paddingOuter": 0.1})
    scale = {"domain": [0, top * _WIDTH / (_WIDTH - 76)], "nice": False}
    x = _of("value:Q", axis=_named(unit), scale=scale, stack=None)
    color = _of("name:N", scale=_scale(list(colors), list(colors.values())), legend=_legend(list(colors)))
    bar = _layer(rows, "bar", {"cornerRadius": 1.5, "aria": True}, x=x, y=y, color=color, description=_of("tip:N"))
    drawn, low_ = [r for r in rows if r["low"] < r["high"]], _of("low:Q", scale=scale)
    whisker = _layer(drawn, "rule", {"color": INK, "strokeWidth": 1.5}, x=low_, x2={"field": "high"}, y=y)
    look = {"align": "left", "dx": 6, "color": SOFT, "fontSize": 11.5}
    value = _layer(rows, "text", look, x=_of("end:Q", scale=scale), y=y, text=_of("text:N"))
    look = {"align": "left", "dy": -2, "fontWeight": 600, "limit": _WIDTH - 150}
    head = _layer(heads, "text", look, x={"value": 0}, y=y, text=_of("name:N"))
    look = {"align": "right", "dy": -2, "fontWeight": 600, "color": WARN}
    mark_ = _layer(heads, "text", look, x={"value": "width"}, y=y, text=_of("mark:N"))
    least, most = (pick(each, key=lambda pair: pair[1].value) for pick in (min, max))
    told = " and ".join(f"{name}, {b.name}: {b.text}" for name, b in (least, most))
    marked = "".join(f" {name}: {mark}." for name, mark, _ in groups if mark)
    cells = [[name, *(next((b.text for b in group if b.name == n), "-") for n in colors)] for name, _, group in groups]
    words = f"{title}: {counted(len(each), 'bar')} in {counted(len(groups), 'group')}. Least and greatest: {told}.{marked}"
    chart = _layers(bar, whisker, value, head, mark_, height=_LINE * (line - 1))
    keys = {name: (color, "none", 1.0) for name, color in colors.items()}
    return Figure(key, title, note, words, chart, Table(title, ["", *colors], cells), keys)


def stack(key: str, title: str, note: str, parts: Sequence[tuple[str, float]]) -> Figure | None:
    """One bar in parts, in seconds."""
    total = sum(v for _, v in parts)
    if total <= 0:
        return None
    rows: list[dict[str, Any]] = []
    start, names = 0.0, [n for n, _ in parts]
    for name, value in parts:
        tip = f"{name}: {value:.1f} s, {percent(value / total)}"
        rows.append({"name": name, "start": start, "end": start + value, "tip": tip})
        start += value
    x = _of("start:Q", axis=_named("seconds"), scale={"domain": [0, total], "nice": False})
    hues, tints = [PALETTE[i % 6] for i in range(len(parts))], _turns(len(parts), (1.0, 0.65, 0.4))
    color = _of("name:N", scale=_scale(names, hues), legend=_legend(names))
    tint = _of("name:N", scale=_scale(names, tints), legend=_legend(names))
    look = {"height": 30, "stroke": CARD, "strokeWidth": 1, "aria": True}
    bar = _layer(rows, "bar", look, x=x, x2={"field": "end"}, color=color, opacity=tint, description=_of("tip:N"))
    cells = [[n, f"{v:,.1f}", percent(v / total)] for n, v in parts] + [["together", f"{total:,.1f}", "100 %"]]
    longest = max(parts, key=lambda p: p[1])
    words = f"{title}: {counted(len(parts), 'part')}, {total:,.0f} s together. Longest: {rows[parts.index(longest)]['tip']}."
    keys = {n: (hue, "none", pale) for n, hue, pale in zip(names, hues, tints, strict=True)}
    table = Table(title, ["phase", "seconds", "share"], cells)
    return Figure(key, title, note, words, _layers(bar, height=34), table, keys, shown=True)


def participation(key: str, sites: Sequence[str], rounds: Sequence[RoundRecord]) -> Figure | None:
    """Site by round; every state has its own sign besides its color."""
    if not rounds:
        return None
    width = min(30 * len(rounds), _WIDTH - 168)
    rows: list[dict[str, Any]] = []
    for site in sites:
        for record in rounds:
            found = state(record, site)
            kind = found if found in _STATES else "not asked" if found in _NOT_ASKED else "rejected"
            sign = _SIGNS.get(kind, "") if width / len(rounds) > 9 else ""
            tip = f"{plain(site)}, round {record.round}: {found}"
            rows.append({"site": plain(site), "round": record.round, "state": kind, "sign": sign, "tip": tip})
    axis = {"title": "round", "labelAngle": 0, "labelOverlap": "parity", "labelSeparation": 5}
    x = _of("round:O", axis=axis, scale={"range": [0, width], "padding": 0.07})
    y = _of("site:N", sort=None, axis={"title": None, "labelLimit": 136}, scale={"padding": 0.07})
    colors = zip(("fill", "stroke"), zip(*_STATES.values(), strict=True), strict=True)
    pen = {use: _of("state:N", scale=_scale(list(_STATES), hues), legend=_legend(list(_STATES))) for use, hues in colors}
    cell = _layer(rows, "rect", {"cornerRadius": 1.5, "aria": True}, x=x, y=y, description=_of("tip:N"), **pen)
    signs = _layer([r for r in rows if r["sign"]], "text", {"color": "#14171a"}, x=x, y=y, text=_of("sign:N"))
    counts = {kind: sum(r["state"] == kind for r in rows) for kind in _STATES}
    words = f"Who took part: {counted(len(sites), 'site')} in {counted(len(rounds), 'round')}. "
    words += ", ".join(f"{kind}: {n}" for kind, n in counts.items() if n) + "."
    table = Table("Who took part", ["round", *map(plain, sites)], [[str(r.round), *(state(r, s) for s in sites)] for r in rounds])
    wider = min(max(map(len, sites), default=0), 24)  # a browser may lack this font and take a wider one
    note = "Filled: counted. L: late. R: rejected. Outline: not asked."
    return Figure(key, "Who took part", note, words, _layers(cell, signs, height=24 * len(sites), left=wider), table)
