"""Words for numbers, and figures as inline SVG. Pure: numbers in, text out.

Every string that comes from a file passes :func:`plain` and, in markup, :func:`escape`: names come from plans that somebody
else wrote. What is not a finite number is left out of a figure. Colours are classes of :data:`STYLE`.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = [
    "HONEST",
    "STYLE",
    "TOGETHER",
    "Bar",
    "Series",
    "bars",
    "colour",
    "escape",
    "finite",
    "label",
    "lines",
    "majority_line",
    "number",
    "participation",
    "percent",
    "plain",
    "reference_points",
    "reported",
    "round_count",
    "size",
    "stack",
    "state",
    "tag",
    "training_rounds",
    "with_interval",
    "with_sd",
]

_WIDTH = 460  # units of every figure; about one pixel each, so that 12-unit text can be read on a telephone

STYLE = """
:root{color-scheme:light dark;--paper:#fcfcfa;--card:#fff;--ink:#1c2126;--soft:#5c6670;--rule:#e2e4e3;--warn:#b34700}
@media(prefers-color-scheme:dark){:root{--paper:#14171a;--card:#1b1f23;--ink:#e6e8ea;--soft:#9aa4ad;--rule:#30363c;--warn:#ff9d5c}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1120px;padding:40px 20px 72px;background:var(--paper);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;font-variant-numeric:tabular-nums}
h1{font-size:1.9rem;line-height:1.2;margin:0 0 6px;overflow-wrap:anywhere}
h2{font-size:1.25rem;margin:56px 0 12px}h3{font-size:1.02rem;margin:36px 0 8px}
p{max-width:44rem;margin:0 0 14px}.soft,figcaption,.caption,dt{color:var(--soft)}
code{font:.9em ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;overflow-wrap:anywhere}
pre{background:var(--card);border:1px solid var(--rule);border-radius:8px;padding:14px 16px;overflow-x:auto;white-space:pre-wrap}
.tiles,.pair{display:grid;gap:18px;grid-template-columns:repeat(auto-fit,minmax(min(100%,230px),1fr))}.tiles{margin:28px 0}
.pair{grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));align-items:start}
.tile,figure{background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:18px 20px;margin:0}
.tile b{display:block;font-size:1.75rem;line-height:1.25;font-weight:600}.tile span{font-size:.88rem;color:var(--soft)}
figcaption{font-size:.88rem;margin-bottom:12px}figcaption b{color:var(--ink);font-size:.98rem;display:block}
figure>svg{display:block;width:100%;height:auto}svg text{font:12px system-ui,sans-serif;fill:var(--ink)}
svg .tick{fill:var(--soft);font-size:11.5px}svg .name{font-weight:600}svg .mark{fill:var(--warn);font-weight:600}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:4px 18px;margin:12px 0 0;padding:0;font-size:.85rem}
.legend li{overflow-wrap:anywhere}.legend svg{width:22px;height:10px;margin-right:7px}.legend .line{stroke-width:4}
.grid{stroke:var(--rule)}.line{fill:none;stroke:var(--c);stroke-width:1.8;stroke-linejoin:round}.dot,.bar{fill:var(--c)}
.whisker{stroke:var(--ink);stroke-width:1.5}.mean{--c:var(--ink)}.line.mean{stroke-width:5;opacity:.3}.dot.mean{opacity:0}
.s0{--c:#0072b2}.s1{--c:#d55e00}.s2{--c:#009e73}.s3{--c:#cc79a7}.s4{--c:#e69f00}.s5{--c:#56b4e9}.s6{--c:#8b949c}
.line.d1{stroke-dasharray:6 3}.line.d2{stroke-dasharray:2 3}.bar.d1{opacity:.65}.bar.d2{opacity:.4}
.counted{fill:#0072b2}.late{fill:#e69f00}.rejected{fill:#d55e00}.not-asked{fill:none;stroke:var(--soft)}svg .sign{fill:#14171a}
.scroll{overflow-x:auto;margin:0 0 22px}table{border-collapse:collapse;font-size:.88rem;width:100%}
.caption{font-size:.88rem;margin:22px 0 6px;max-width:none}th,td{text-align:right;padding:6px 10px}
th,td{border-bottom:1px solid var(--rule);white-space:nowrap}
th{font-weight:400}th:first-child{text-align:left;padding-left:0}tr.main>*{font-weight:650}
thead th{color:var(--soft);font-weight:500;vertical-align:bottom}
details{border-top:1px solid var(--rule);margin-top:32px}summary{cursor:pointer;padding:14px 0;font-weight:600}
dl{display:grid;grid-template-columns:fit-content(42%) 1fr;gap:4px 20px;font-size:.92rem}dd{margin:0;overflow-wrap:anywhere}
@media(max-width:480px){body{padding:24px 14px 48px}.tile,figure{padding:14px}h2{margin-top:44px}}
@media print{body{max-width:none;padding:0;font-size:11pt}.tile,figure,tr{break-inside:avoid}.scroll{overflow:visible}}
"""
"""Style sheet for figures and the page around them: Okabe and Ito's colours, light and dark, telephone and paper."""

TOGETHER = "all together"
"""Under this name stand numbers that are known of all sites together, and of none alone."""
HONEST = "A test of federated learning, not of clinical skill."

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
    known = {"base": "base model", "local": "alone: mean", "better": "the better of both"}
    return known.get(arm) or plain(arm).replace("local:", "alone: ", 1)


def number(value: Any, *, sign: str = "") -> str:
    """Three decimals, fewer if it is large: never more than eight characters."""
    v = finite(value)
    return "-" if v is None else f"{v:{sign}.{3 if abs(v) < 99 else 1}f}" if abs(v) < 9999 else f"{v:{sign}.1e}"


def percent(value: Any) -> str:
    """A share as per cent."""
    v = finite(value)
    return "-" if v is None else f"{100 * v:.1f} %"


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
    mean, sd = (_shown(spread[k], unit) for k in ("mean", "sd"))
    return mean if mean == "-" else mean + f" +- {sd}" * (sd != "-") + f" {unit}" * bool(unit)


def with_interval(spread: Mapping[str, Any], *, unit: str = "") -> str:
    """``mean [low, high]``; ``unit="%"`` for shares, in points."""
    mean, low, high = (_shown(spread[k], unit, sign="+") for k in ("mean", "low", "high"))
    return mean if low == "-" else f"{mean} [{low}, {high}]"


def _shown(value: Any, unit: str, *, sign: str = "") -> str:
    v = finite(value)
    return number(v, sign=sign) if v is None or not unit else f"{100 * v:{sign}.1f}"


def reference_points(dataset: Mapping[str, Any]) -> list[tuple[str, float]]:
    """What exact match is without learning: (name, share)."""
    names = {"chance": "chance", "majority": "majority label", "nearest_neighbour": "word-overlap 1-NN"}
    found = dataset.get("reference") or {}
    return [(n, v) for k, n in names.items() if (v := finite(found.get(k))) is not None]


def training_rounds(run: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The records of rounds that changed the adapter: all but the last evaluation."""
    return [r for r in run.get("rounds") or [] if any(k in r for k in ("adapter", "gap/ratio", "seconds/aggregate"))]


def round_count(run: Mapping[str, Any]) -> int:
    """Rounds of training."""
    return len(training_rounds(run))


def majority_line(rounds: Sequence[Mapping[str, Any]]) -> str:
    """Whether one site decided more than all others together, and in how many rounds; empty without rounds of training."""
    known = [r for r in rounds if any("weight" in numbers for numbers in (r.get("sites") or {}).values())]
    counts: dict[str, int] = {}
    for site in (s for r in known for s in r.get("majority") or {}):
        counts[site] = counts.get(site, 0) + 1
    if any(r.get("together") for r in rounds):
        return "weights of single sites: not known under secure aggregation, so nobody can say whether one had more than half"
    if not known:
        return ""
    said = ", ".join(f"{plain(s)} in {n} of {len(known)} rounds" for s, n in sorted(counts.items()))
    return f"more than half of a round's weight: {said or 'no site'}"


# --- figures ----------------------------------------------------------------------------------------------------


def escape(value: Any) -> str:
    """``value`` for markup: between tags and within quotes."""
    return html.escape(plain(value), quote=True)


def tag(name: str, body: str = "", **attributes: Any) -> str:
    """An element; ``body`` is markup already, attributes are escaped here. ``class_`` is class, ``_`` in a name is ``-``."""
    pairs = "".join(f' {k.rstrip("_").replace("_", "-")}="{escape(v)}"' for k, v in attributes.items())
    return f"<{name}{pairs}>{body}</{name}>"


def _text(x: float, y: float, text: Any, css: str = "", anchor: str = "start") -> str:
    return tag("text", escape(text), x=f"{x:.1f}", y=f"{y:.1f}", **({"class_": css} if css else {}), text_anchor=anchor)


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

    def ticks(self, about: int = 5) -> list[float]:
        """Round numbers within, a few more or less than ``about``."""
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            ticks = [t for k in powers for m in (1, 2, 5) if self.low <= (t := m * 10.0**k) <= self.high]
            return ticks[:: len(ticks) // 9 + 1]
        raw = (self.high - self.low) / about
        unit = 10.0 ** math.floor(math.log10(raw))
        step = next(m * unit for m in (1, 2, 5, 10) if m * unit >= raw)
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
    body = ""
    for t in ys.ticks():
        body += tag("path", class_="grid", d=f"M{left} {ys.at(t):.1f}H{_WIDTH - 8}")
        body += _text(left - 6, ys.at(t) + 4, f"{t:.4g}", "tick", "end")
    body += "".join(_text(xs.at(t), bottom + 17, f"{t:g}", "tick", "middle") for t in xs.ticks(8) if t == int(t))
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
                path = f"M{xs.at(max(b.spread[0], 0)):.1f} {y + 5.5:.1f}H{xs.at(end):.1f}"
                body += tag("path", class_="whisker", d=path)
            body += _text(xs.at(end) + 6, y + 10, b.text, "tick")
            y += 15
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
    signs = {"counted": "", "late": "L", "not asked": "", "rejected": "R"}
    for row, site in enumerate(sites):
        body += _text(0, row * 24 + 16, plain(site) if len(site) < 19 else plain(site)[:17] + "…", "tick")
        for column, record in enumerate(rounds):
            found = state(record, site)
            kind = found if found in signs else "rejected"
            x, tip = left + column * cell, f"{site}, round {record['round']}: {found}"
            body += _rect(x, row * 24 + 2, cell - 2, 20, f"cell {kind.replace(' ', '-')}", tip)
            if signs[kind] and cell > 9:
                body += _text(x + cell / 2 - 1, row * 24 + 16, signs[kind], "sign", "middle")
    y = len(sites) * 24 + 14
    middle = left + cell / 2 - 1
    ticks = [_text(middle + i * cell, y, r["round"], "tick", "middle") for i, r in enumerate(rounds) if i % every == 0]
    note = "Filled: counted. L: late. R: rejected. Outline: not asked."
    return _figure(key, "Who took part", note, y + 8, body + "".join(ticks))


def reported(record: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """What is known of each site, and of all together where single ones are not known."""
    together = record.get("together")
    return {**(record.get("sites") or {}), **({TOGETHER: together} if together else {})}


def state(record: Mapping[str, Any], site: str) -> str:
    """counted, late, not asked, or the code of the rejection."""
    accepted, rejected = record.get("sites") or {}, record.get("rejected") or {}
    if site in accepted:
        return "counted"
    if site in rejected:
        return plain(rejected[site])
    return "not asked"
