"""Whether a class can be a rule, seen when it is registered: before a base is loaded, and not in the middle of a round.

What only a call can show, the type of what a method returns, is looked at where the method is called.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

import numpy as np

from fedlora.core.adapter import Adapter, Factors, Layout
from fedlora.core.errors import ConfigError, RunFailed
from fedlora.core.messages import Reveals
from fedlora.core.section import Section
from fedlora.rules.protocol import Aggregated, Aggregator, Rule
from fedlora.rules.sums import Accumulator

_METHODS: Mapping[str, Callable[..., Any]] = {
    "finish": Aggregator.finish,
    **{name: getattr(Rule, name) for name in ("trains", "down", "reply", "encode", "check_published", "start")},
    **{name: getattr(Rule, name).__func__ for name in ("of", "conflicts")},
}
"""What is called of a rule, the first two words of ``of`` and ``conflicts`` being a class."""
_OF_CLASS = ("of", "conflicts")
_FLAGS = ("refactorizes", "varies_rank", "keeps_moments", "keeps_local_factor", "mixes_ranks")
_RETURN = "return fedlora.Aggregated({}, delta=fedlora.Adapter(vector, sums.layout)), vector being float32"
_NEEDS = (
    'needs = "sum": finish gets the weighted sum alone, sums.mean(); needs = "each": every update, sums.deltas[site]; '
    "without annotation"
)


def check_rule(name: str, entry: object) -> None:
    """Refuses what cannot be a rule.

    Raises:
        ConfigError: no class, of no rule's kind, ``needs`` or another attribute is not one of its values, or a method cannot be
            called as it will be.
    """
    if not isinstance(entry, type):
        found = f"{type(entry).__name__} {getattr(entry, '__name__', '')}".strip()
        raise ConfigError(f"the rule {name!r} is no class but a {found}", hint=f"a class: {_skeleton('Name')}")
    what = f"the rule {name!r}, class {entry.__name__}{_place_of(entry)}"
    for why, hint in _wrongs(entry):
        raise ConfigError(f"{what}, {why}", hint=hint)


def _wrongs(entry: type) -> Iterator[tuple[str, str]]:
    """What is wrong, the first mistake first, and what to write."""
    if not issubclass(entry, Rule) and (lost := [n for n in (*_METHODS, *_FLAGS, "Settings") if not hasattr(entry, n)]):
        bare = "finish" in lost
        why = f"is no fedlora.Rule, and has no {', '.join(lost[:3])}{', ...' * (len(lost) > 3)}"
        yield why, _skeleton(entry.__name__) if bare else f"derive it: class {entry.__name__}(fedlora.Rule)"
    yield from _wrong_needs(entry)
    for flag in _FLAGS:
        if type(value := inspect.getattr_static(entry, flag, False)) is not bool and not isinstance(value, property):
            yield f"says {flag} = {_shown(value)}, which has to be True or False", f"{flag} = True, or leave it out"
    if not (isinstance(settings := getattr(entry, "Settings", None), type) and issubclass(settings, Section)):
        yield (
            f"says Settings = {_shown(settings)}, which has to be a class of fedlora.Section",
            "Settings = a class of fedlora.Section; or leave it out",
        )
    for method, model in _METHODS.items():
        yield from _wrong_method(entry, method, model)
    if inspect.getattr_static(entry, "of") is inspect.getattr_static(Rule, "of") and not _takes(entry, ["max_weight"], []):
        yield "cannot be made of a plan as Class(max_weight)", "a field of its own needs a default; or write the class method of"


def _wrong_needs(entry: type) -> Iterator[tuple[str, str]]:
    words = get_args(Reveals)
    if (needs := inspect.getattr_static(entry, "needs", None)) not in words or not isinstance(needs, str):
        said = f"says needs = {_shown(needs)}" if needs is not None else "does not say needs"
        yield f"{said}, which has to be {' or '.join(map(repr, words))}", _NEEDS
    ours = next((one for one in entry.__mro__ if one.__module__.startswith("fedlora.")), None)
    own = entry.__mro__[: entry.__mro__.index(ours)] if ours else ()
    stated = any({"needs", "start"} & vars(one).keys() for one in own)
    if ours is Rule and not stated:  # one that extends a built-in rule sees what that one sees
        yield "does not say whether finish sees the sum of all updates or each of them", _NEEDS


def _wrong_method(entry: type, method: str, model: Callable[..., Any]) -> Iterator[tuple[str, str]]:
    written = f"def {method}{_signature(model)}"
    found = inspect.getattr_static(entry, method, None)
    if found is None:
        yield f"has no method {method}", written
        return
    inner = getattr(found, "__func__", found)
    if not callable(inner):
        yield f"has {method} = {_shown(inner)}, which has to be a method", written
        return
    bound = isinstance(found, staticmethod)  # without self or cls
    if method in _OF_CLASS and not isinstance(found, staticmethod | classmethod):
        yield f"has {method}{_place(inner)} as a method of its objects; it is called of the class", f"@classmethod, {written}"
        return
    positional, keywords = _called(model)
    if not _takes(inner, [] if bound else ["self"], [], more=(positional, keywords)):
        has = f"has {method}{_given(inner)}{_place(inner)}, called as {method}({_call(positional, keywords)})"
        yield has, f"write it as {written}"
    elif inspect.iscoroutinefunction(inner) or (inspect.isgeneratorfunction(inner) and method != "conflicts"):
        yield f"has {method}{_place(inner)} with async or yield: a call gives no result", written


def _called(model: Callable[..., Any]) -> tuple[list[str], list[str]]:
    """How a method is called: what by its place, after self or cls, and what by its name."""
    found = list(inspect.signature(model).parameters.values())[1:]
    return [p.name for p in found if p.kind != p.KEYWORD_ONLY], [p.name for p in found if p.kind == p.KEYWORD_ONLY]


def _takes(
    found: Callable[..., Any], positional: Sequence[str], keywords: Sequence[str], *, more: tuple[list[str], list[str]] = ([], [])
) -> bool:
    try:
        sig = inspect.signature(found)
    except (ValueError, TypeError):  # of a library in C: only the call can show it
        return True
    try:
        sig.bind(*positional, *more[0], **dict.fromkeys([*keywords, *more[1]]))
    except TypeError:
        return False
    return True


def _call(positional: Sequence[str], keywords: Sequence[str]) -> str:
    return ", ".join([*positional, *(f"{name}=..." for name in keywords)])


def _signature(model: Callable[..., Any]) -> str:
    positional, keywords = _called(model)
    first = next(iter(inspect.signature(model).parameters))
    return f"({', '.join([first, *positional, *['*'] * bool(keywords), *keywords])})"


def _given(found: Callable[..., Any]) -> str:
    return f"({', '.join(str(p.replace(annotation=p.empty)) for p in inspect.signature(found).parameters.values())})"


def _skeleton(name: str) -> str:
    return f'class {name}(fedlora.Rule) with needs = "sum" or "each", and def finish{_signature(Aggregator.finish)}'


def _shown(value: object) -> str:
    return repr(value)[:60] if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"


def _code(found: object) -> Any:
    found = inspect.unwrap(found) if callable(found) else found
    return getattr(getattr(found, "__func__", found), "__code__", None)


def _place(found: object) -> str:
    """`` (FILE, line N)`` of a function; nothing of what has none."""
    code = _code(found)
    return f" ({code.co_filename}, line {code.co_firstlineno})" if code else ""


def _place_of(entry: type) -> str:
    """The file of a class, from its methods: one of a notebook's cell is in no file of its module."""
    codes = filter(None, map(_code, vars(entry).values()))
    file = next((code.co_filename for code in codes if not code.co_filename.startswith("<")), "")
    return f" ({file})" if file else ""


# --- what a method returns ----------------------------------------------------------------------------------------------


def finished(found: Aggregated, rule: Aggregator, adapter: Adapter) -> Aggregated:
    """What ``finish`` has returned for this adapter, its numbers as floats.

    Raises:
        RunFailed: it is of another type, or does not fit the adapter.
    """
    if not isinstance(found, Aggregated):
        raise _other(rule, "finish", found, "an Aggregated", _RETURN)
    if (found.delta is None) == (found.adapter is None):
        raise _wrong(rule, "finish", "has returned an Aggregated with neither or both of delta and adapter", _RETURN)
    name, given = ("adapter", found.adapter) if found.delta is None else ("delta", found.delta)
    if not isinstance(given, Adapter):
        raise _other(rule, "finish", given, f"an Aggregated whose {name} is an Adapter", _RETURN)
    shapes = dict(adapter.layout.entries)
    own = found.adapter is not None and rule.varies_rank
    if not own and any(shapes.get(tensor) != shape for tensor, shape in given.layout.entries):
        raise _wrong(rule, "finish", f"has returned a {name} with tensors that the adapter has not, or in other shapes", _RETURN)
    if found.adapter is not None and given.layout.entries != adapter.layout.entries and not own:
        raise _wrong(rule, "finish", "has returned an adapter that lacks tensors of the round's", "or return the change as delta")
    for kept in found.state.values() if isinstance(found.state, Mapping) else [None]:
        if not isinstance(kept, Adapter):
            raise _other(rule, "finish", kept, "a state of names and Adapters", "fedlora.Adapter keeps a vector with its layout")
    return replace(found, record=_numbers(found.record, rule))


def _numbers(record: object, rule: Aggregator) -> dict[str, float]:
    hint = 'names and numbers, for example {"agreed": 0.5}; or {}'
    if not isinstance(record, Mapping):
        raise _other(rule, "finish", record, "a record of names and numbers", hint)
    for name, value in record.items():
        if not isinstance(name, str) or not isinstance(value, float | int | np.number | np.bool_) or not math.isfinite(value):
            raise _wrong(rule, "finish", f"has returned a record in which {_shown(name)} is no finite number", hint)
    return {name: float(value) for name, value in record.items()}


def started(found: Accumulator, rule: Aggregator) -> Accumulator:
    """What ``start`` has returned.

    Raises:
        RunFailed: it is no accumulator.
    """
    if not (callable(getattr(found, "add", None)) and isinstance(getattr(found, "layout", None), Layout)):
        raise _other(rule, "start", found, "an accumulator", "fedlora.rules.Sums.start(...) or fedlora.rules.Each(...)")
    return found


def replied(found: Layout, rule: Aggregator) -> Layout:
    """What ``reply`` has returned.

    Raises:
        RunFailed: it is no layout.
    """
    if not isinstance(found, Layout):
        raise _other(rule, "reply", found, "a Layout", "return layout, or layout.only(factors)")
    return found


def check_encode(rule: Aggregator, first: Adapter) -> None:
    """Encodes no change once, where an error of it can still be read: a site of a run answers with a code alone.

    Raises:
        RunFailed: the result is no vector of what ``reply`` says.
    """
    size, found = replied(rule.reply(first.layout, 1), rule).size, rule.encode(first, first, round=1)
    if not isinstance(found, np.ndarray) or found.dtype != np.float32 or found.shape != (size,):
        shown = f"{found.shape} {found.dtype}" if isinstance(found, np.ndarray) else _shown(found)
        why = f"has returned {shown} rather than ({size},) float32, the layout of reply"
        raise _wrong(rule, "encode", why, "return the change of these tensors as one vector")


def made(found: Rule, chosen: type[Rule]) -> Rule:
    """What ``of`` has returned, and which factors it says.

    Raises:
        RunFailed: it is no rule of this class, or they are none.
    """
    if not isinstance(found, chosen):
        raise _other(chosen, "of", found, f"a {chosen.__name__}", "return cls(max_weight)")
    for method, factors in (("down", found.down()), ("trains", found.trains(1))):
        if factors not in get_args(Factors):
            raise _other(chosen, method, factors, "'AB', 'A' or 'B'", f"return 'AB', or leave {method} out")
    return found


def _other(rule: object, method: str, found: object, wanted: str, hint: str) -> RunFailed:
    return _wrong(rule, method, f"has returned {_shown(found)} rather than {wanted}", hint)


def _wrong(rule: object, method: str, why: str, hint: str) -> RunFailed:
    kind = rule if isinstance(rule, type) else type(rule)
    return RunFailed(f"the rule {kind.__name__}: {method}{_place(getattr(kind, method))} {why}", hint=hint)
