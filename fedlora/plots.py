"""Words for numbers, and figures as inline SVG. Pure: numbers in, text out.

Every string that comes from a file passes :func:`plain` and, in markup, :func:`escape`: names come from plans that somebody
else wrote. What is not a finite number is left out of a figure. Colours are classes, for the page's style sheet to set.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = [
    "Bar",
    "Series",
    "bars",
    "colour",
    "escape",
    "finite",
    "label",
    "lines",
    "number",
    "participation",
    "percent",
    "plain",
    "reference_points",
    "size",
    "stack",
    "state",
    "tag",
    "training_rounds",
    "with_interval",
    "with_sd",
]

_WIDTH = 460  # units of every figure; about one pixel each, so that 12-unit text can be read on a telephone

# --- words ------------------------------------------------------------------------------------------------------


def finite(value: Any) -> float | None:
    """``value`` as a float if it is a number between -1e100 and 1e100, else None. Below 1e-100 it is 0: figures divide."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= 1e100:
        return None
    return float(value) if abs(value) >= 1e-100 else 0.0


def plain(value: Any) -> str:
    """``value`` as text without control, direction-changing or unprintable characters, which could forge a terminal's output."""
    return "".join(c if c.isprintable() else "?" for c in str(value))


def label(arm: str) -> str:
    """An arm's name for people."""
    return {"base": "base model", "local": "alone: mean", "better": "the better of them"}.get(arm) or plain(arm).replace("local:", "alone: ", 1)


def number(value: Any, *, sign: str = "", missing: str = "-") -> str:
    """Three decimals, or three digits if it is large."""
    v = finite(value)
    return missing if v is None else f"{v:{sign}.3f}" if abs(v) < 1e5 else f"{v:{sign}.3g}"


def percent(value: Any, *, missing: str = "-") -> str:
    """A share as per cent."""
    v = finite(value)
    return missing if v is None else f"{100 * v:.1f} %"


def size(n_bytes: Any) -> str:
    """Bytes in powers of 1000."""
    n = finite(n_bytes) or 0.0
    for unit in ("B", "kB", "MB", "GB"):
        if abs(n) < 999.5 or unit == "GB":
            break
        n /= 1000
    return f"{n:.3g} {unit}" if abs(n) < 999.5 else f"{n:,.0f} {unit}"


def with_sd(spread: Mapping[str, Any], *, unit: str = "") -> str:
    """``mean +- sd``; ``unit="%"`` for shares."""
    times, digits, missing = (100, 1, "-") if unit else (1, 3, "-")
    mean, sd = finite(spread["mean"]), finite(spread["sd"])
    if mean is None:
        return missing
    return f"{times * mean:.{digits}f}" + ("" if sd is None else f" +- {times * sd:.{digits}f}") + (f" {unit}" if unit else "")


def with_interval(spread: Mapping[str, Any], *, unit: str = "") -> str:
    """``mean [low, high]``; ``unit="%"`` for shares, in points."""
    times, digits = (100, 1) if unit else (1, 3)
    mean, low, high = (finite(spread[k]) for k in ("mean", "low", "high"))
    if mean is None:
        return "-"
    text = f"{times * mean:+.{digits}f}"
    return text if low is None or high is None else f"{text} [{times * low:+.{digits}f}, {times * high:+.{digits}f}]"


def reference_points(dataset: Mapping[str, Any]) -> list[tuple[str, float]]:
    """What exact match is without learning: (name, share)."""
    names = {"chance": "chance", "majority": "majority label", "nearest_neighbour": "word-overlap 1-NN"}
    found = dataset.get("reference") or {}
    return [(n, v) for k, n in names.items() if (v := finite(found.get(k))) is not None]


def training_rounds(run: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The records of rounds that changed the adapter: all but the last evaluation."""
    return [r for r in run.get("rounds") or [] if any(k in r for k in ("adapter", "gap/ratio", "seconds/aggregate"))]

# --- figures ----------------------------------------------------------------------------------------------------


def escape(value: Any) -> str:
    return html.escape(plain(value), quote=True)


def tag(name: str, body: str = "", **attributes: Any) -> str:
    """An element; ``body`` is markup already, attributes are escaped here. ``class_`` is class, ``_`` in a name is ``-``."""
    pairs = "".join(f' {k.rstrip("_").replace("_", "-")}="{escape(v)}"' for k, v in attributes.items())
    return f"<{name}{pairs}>{body}</{name}>"


def _text(x: float, y: float, text: Any, css: str = "", anchor: str = "start") -> str:
    return tag("text", escape(text), x=f"{x:.1f}", y=f"{y:.1f}", class_=css, text_anchor=anchor)


def _rect(x: float, y: float, width: float, height: float, css: str, tip: str = "") -> str:
    at = {"x": f"{x:.1f}", "y": f"{y:.1f}", "width": f"{max(width, 0):.1f}", "height": f"{height:.1f}", "rx": "1.5"}
    return tag("rect", tag("title", escape(tip)) if tip else "", **at, class_=css)


def _figure(key: str, title: str, note: str, height: float, body: str, names: Sequence[tuple[str, str]] = ()) -> str:
    """An SVG of a title and a description, with its caption and legend ((name, css class), ...)."""
    head = tag("title", escape(title), id=f"{key}-t") + tag("desc", escape(note), id=f"{key}-d")
    box = f"0 0 {_WIDTH} {height:.0f}"
    drawing = tag("svg", head + body, viewBox=box, role="img", aria_labelledby=f"{key}-t {key}-d")
    swatch = '<svg viewBox="0 0 22 10" aria-hidden="true"><path d="M1 5H21" class="line {}"/></svg>'
    keys = "".join(tag("li", swatch.format(escape(css)) + escape(name)) for name, css in names)
    legend = tag("ul", keys, class_="legend") if keys else ""
    return tag("figure", tag("figcaption", tag("b", escape(title)) + " " + escape(note)) + drawing + legend)


def colour(i: int) -> str:
    """Six colours, then the same dashed, then dotted."""
    return f"s{i % 6} d{i // 6 % 3}"


@dataclass(frozen=True, slots=True)
class _Scale:
    """Maps ``low .. high`` to ``start .. end`` in units of the figure, evenly or by logarithm."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    @classmethod
    def over(cls, values: Sequence[float], start: float, end: float) -> _Scale:
        """With room around the values; logarithmic where they span more than a factor of six."""
        low, high = min(values), max(values)
        if low > 0 and high / low > 6:
            return cls(low * 0.85, high * 1.15, start, end, log=True)
        room = (high - low) * 0.08 or abs(high) * 0.1 or 1.0
        return cls(0.0 if 0 <= low < 0.5 * high else low - room, high + room, start, end)

    def at(self, value: float) -> float:
        f = math.log if self.log else float
        return self.start + (f(value) - f(self.low)) / (f(self.high) - f(self.low)) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Three to nine round numbers within."""
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            ticks = [t for k in powers for m in (1, 2, 5) if self.low <= (t := m * 10.0**k) <= self.high]
            return ticks[:: len(ticks) // 9 + 1]
        raw = (self.high - self.low) / 5
        unit = 10.0 ** math.floor(math.log10(raw))
        step = next(m * unit for m in (1, 2, 2.5, 5, 10) if m * unit >= raw)
        return [k * step for k in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]


@dataclass(frozen=True, slots=True)
class Series:
    name: str
    style: str
    points: Sequence[tuple[float, float | None]]


def lines(key: str, title: str, note: str, series: Sequence[Series]) -> str:
    """Lines over round numbers; a line breaks where a value is missing."""
    known = [(x, y) for s in series for x, y in s.points if y is not None]
    if not known:
        return ""
    height, left, bottom = 230, 46, 204
    ys = _Scale.over([y for _, y in known], bottom, 10)
    xs = _Scale(min(x for x, _ in known) - 0.3, max(x for x, _ in known) + 0.3, left, _WIDTH - 8)
    body = "".join(
        tag("path", class_="grid", d=f"M{left} {ys.at(t):.1f}H{_WIDTH - 8}") + _text(left - 6, ys.at(t) + 4, f"{t:.4g}", "tick", "end")
        for t in ys.ticks()
    )
    body += "".join(_text(xs.at(t), bottom + 17, f"{t:g}", "tick", "middle") for t in xs.ticks() if t == int(t))
    for s in series:
        path, pen = "", "M"
        for x, y in s.points:
            path += "" if y is None else f"{pen}{xs.at(x):.1f} {ys.at(y):.1f}"
            pen = "M" if y is None else "L"
        body += tag("path", class_=f"line {s.style}", d=path)
        for x, y in s.points:
            if y is not None:
                tip = tag("title", escape(f"{s.name}, {x:g}: {y:.4g}"))
                body += tag("circle", tip, cx=f"{xs.at(x):.1f}", cy=f"{ys.at(y):.1f}", r=2.4, class_=f"dot {s.style}")
    note += " Logarithmic scale." * ys.log
    return _figure(key, title, note, height, body, [(s.name, s.style) for s in series] if len(series) > 1 else [])


@dataclass(frozen=True, slots=True)
class Bar:
    """``spread``: least and greatest over seeds, drawn as a whisker."""

    name: str
    style: str
    value: float | None
    text: str
    spread: tuple[float, float] | None = None


def bars(key: str, title: str, note: str, groups: Sequence[tuple[str, str, Sequence[Bar]]]) -> str:
    """Horizontal bars from zero in groups of (name, mark, bars), so that any number of sites can be read on a telephone."""
    bars = [b for _, _, group in groups for b in group]
    top = max([v for b in bars for v in (b.value or 0.0, *(b.spread or ()))], default=0.0)
    if top <= 0:
        return ""
    xs, y, body = _Scale(0.0, top, 0.0, _WIDTH - 76), 0.0, ""
    for name, mark, group in groups:
        body += _text(0, y + 14, name, "name") + _text(_WIDTH, y + 14, mark, "mark", "end")
        y += 20
        for b in group:
            value = max(b.value or 0.0, 0.0)
            body += _rect(0, y, xs.at(value), 11, f"bar {b.style}", f"{name}, {b.name}: {b.text}")
            end = value
            if b.spread and b.spread[0] < b.spread[1]:
                end = max(value, b.spread[1])
                body += tag("path", class_="whisker", d=f"M{xs.at(max(b.spread[0], 0)):.1f} {y + 5.5:.1f}H{xs.at(b.spread[1]):.1f}")
            body += _text(xs.at(end) + 6, y + 10, b.text, "tick")
            y += 14
        y += 10
    return _figure(key, title, note, y, body, list(dict.fromkeys((b.name, b.style) for b in bars if b.name)))


def stack(key: str, title: str, note: str, parts: Sequence[tuple[str, float]]) -> str:
    """One bar in parts."""
    total, x, body = sum(v for _, v in parts), 0.0, ""
    if total <= 0:
        return ""
    for i, (name, value) in enumerate(parts):
        width = value / total * _WIDTH
        body += _rect(x, 2, width - 1, 30, f"bar {colour(i)}", f"{name}: {value:.1f} s, {percent(value / total)}")
        x += width
    return _figure(key, title, note, 36, body, [(name, colour(i)) for i, (name, _) in enumerate(parts)])


def participation(key: str, sites: Sequence[str], rounds: Sequence[Mapping[str, Any]]) -> str:
    """Site by round; every state has its own sign besides its colour."""
    if not rounds:
        return ""
    left = 132
    cell = min(30.0, (_WIDTH - left) / len(rounds))
    every, body = math.ceil(22 / cell), ""
    signs = {"counted": "", "late": "L", "not asked": "", "rejected": "×"}
    for row, site in enumerate(sites):
        body += _text(0, row * 24 + 16, plain(site) if len(site) < 19 else plain(site)[:17] + "…", "tick")
        for column, record in enumerate(rounds):
            found = state(record, site)
            kind = found if found in signs else "rejected"
            x, tip = left + column * cell, f"{site}, round {record['round']}: {found}"
            body += _rect(x, row * 24 + 2, cell - 2, 20, f"cell {kind.replace(' ', '-')}", tip)
            body += _text(x + cell / 2 - 1, row * 24 + 16, signs[kind], "sign", "middle") if signs[kind] and cell > 9 else ""
    y = len(sites) * 24 + 14
    ticks = [_text(left + i * cell + cell / 2 - 1, y, r["round"], "tick", "middle") for i, r in enumerate(rounds) if i % every == 0]
    note = "Filled: counted. L: late. ×: rejected. Outline: not asked."
    return _figure(key, "Who took part", note, y + 8, body + "".join(ticks))


def state(record: Mapping[str, Any], site: str) -> str:
    """counted, late, not asked, or the code of the rejection."""
    accepted, rejected = record.get("sites") or {}, record.get("rejected") or {}
    if site in accepted:
        return "counted"
    if site in rejected:
        return plain(rejected[site])
    return "counted" if "*" in accepted and site in (record.get("asked") or []) else "not asked"  # * is a sum over the rest
