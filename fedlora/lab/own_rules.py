"""Aggregation rules of the researcher's own: from her script, or from a package that she has installed.

Only what she names on her own command line is loaded. A plan names a rule, and a plan may come from elsewhere: it never makes
anything be imported. In a deployment a rule has to be registered at every end by a script there.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, TypedDict

from fedlora.core.errors import ConfigError, RunFailed
from fedlora.core.registry import RULES
from fedlora.rules import BUILT_IN, Sums

_OWN: set[str] = set()
"""Modules that she has named."""
GROUP = "fedlora.rules"
"""Entry point group of a package: ``name = "module:Rule"``."""
_SERVER = "it is an optimizer of the server, with any rule: server_optimizer.name = '{}'"
_ELSEWHERE = {
    "fedprox": "FedProx is a term of local training, with any rule: training.proximal_mu = 0.01, for example",
    **{name: _SERVER.format(name.replace("fedsgd", "sgd")) for name in ("fedavgm", "fedadam", "nesterov", "fedsgd")},
    **{
        name: f"it is a statistic of the rule robust: aggregate.name = 'robust', aggregate.robust.statistic = '{statistic}'"
        for name, statistic in {
            "median": "median",
            "trimmed": "trimmed",
            "krum": "multi-krum",
            "multi-krum": "multi-krum",
        }.items()
    },
    "fedit": "averaging the factors is what fedavg does",
    "fedsa": "each site keeps its own B: aggregate.name = 'fedavg', aggregate.fedavg.share = 'A'",
}
"""What is known as a method of its own elsewhere, and is another key here."""
_EXAMPLE = "`fedlora simulate --help`; EXAMPLE.md beside the package has a whole one"


@contextmanager
def told_of() -> Iterator[None]:
    """A plan whose rule is not there may mean one of hers; and hers is asked what it does not go with in a plan."""
    try:
        with own_errors(hint="correct it; nothing has run"):
            yield
    except ConfigError as e:
        found = re.search(r"no rule is called '([^']*)'", str(e))
        if found is None:
            raise
        own = "a rule of your own: --rule FILE.py, or the name of an installed one"
        raise ConfigError(str(e), hint=_ELSEWHERE.get(found[1].lower(), own)) from None


_GO_ON = "correct it; --resume goes on where no round of it was done, else choose another --out"
_SUMS = 'it has the sum alone, sums.mean(); needs = "each" in the class shows it every update, sums.deltas[site]'


@contextmanager
def own_errors(*, hint: str = _GO_ON) -> Iterator[None]:
    """What her own code raises is no bug of FedLoRA: she needs the place and the text.

    Raises:
        RunFailed: in place of it.
    """
    try:
        yield
    except MemoryError:
        raise
    except (Exception, SystemExit) as e:
        places = [
            (f.f_code.co_filename, line) for f, line in traceback.walk_tb(e.__traceback__) if f.f_globals.get("__name__") in _OWN
        ]
        if not places:
            raise
        file, line = places[-1]
        why = f"the rule of your own fails: {type(e).__name__}: {e} ({file}, line {line})"
        if isinstance(e, AttributeError) and isinstance(e.obj, Sums):
            hint = _SUMS
        raise RunFailed(why, hint=getattr(e, "hint", "") or hint) from e


def use_rules(named: Sequence[str]) -> None:
    """Registers rules.

    Args:
        named: each a Python file that registers one, or the name of an entry point of the group ``fedlora.rules``.

    Raises:
        ConfigError: there is none of that name, it registers nothing, or it fails as it is imported.
    """
    for name in named:
        if name.endswith(".py"):
            _from_file(Path(name))
        else:
            _from_package(name)


def _from_file(file: Path) -> None:
    module = f"fedlora_rule_{file.resolve().stem}"
    spec = importlib.util.spec_from_file_location(module, file.resolve())
    if spec is None or spec.loader is None or not file.is_file():
        raise ConfigError(f"--rule {file}: there is no such file", hint=_EXAMPLE)
    if getattr(sys.modules.get(module), "__file__", "") == str(file.resolve()):
        return
    found, before = importlib.util.module_from_spec(spec), set(RULES.names())
    sys.modules[module] = found
    _OWN.add(module)
    _LOADED[module] = Source(file=file.name, sha256=_digest(file.read_bytes()))  # before it runs: it may change under a run
    try:
        _tried(f"--rule {file}", lambda: spec.loader.exec_module(found))
        if set(RULES.names()) == before:
            raise ConfigError(f"--rule {file} registers no rule", hint='a class with @fedlora.RULES.register("my-rule") above it')
    except BaseException:  # or a notebook that asks again would find the module there, and take it for whole
        del sys.modules[module]
        for name in set(RULES.names()) - before:
            RULES.forget(name)
        raise


def _from_package(name: str) -> None:
    installed = {point.name: point for point in entry_points(group=GROUP)}
    if name not in installed:
        known = f"installed are {', '.join(sorted(installed))}" if installed else f"no package has the group {GROUP!r}"
        raise ConfigError(
            f"--rule {name}: no installed package has a rule of this name; {known}", hint="a script: --rule FILE.py"
        )
    rule = _tried(f"--rule {name}", installed[name].load)
    module = str(getattr(rule, "__module__", ""))
    _OWN.add(module)
    if (dist := installed[name].dist) is not None:
        _LOADED[module] = Source(package=f"{dist.name} {dist.version}", sha256=_of_module(module) or _of_class(rule))
    if name not in RULES:
        RULES.register(name, rule)
    elif RULES[name] is not rule:
        raise ConfigError(f"--rule {name}: a rule of this name is there already", hint="rename the entry point of the package")


def _tried(what: str, load: Any) -> Any:
    try:
        return load()
    except ConfigError:
        raise
    except SyntaxError as e:
        why = f"{what} cannot be imported: {type(e).__name__}: {e.msg} ({e.filename}, line {e.lineno})"
    except (Exception, SystemExit) as e:  # her own code, on her own machine: she needs the place and the text
        frames = traceback.extract_tb(e.__traceback__)
        frame = next((f for f in reversed(frames) if what.endswith(Path(f.filename).name)), frames[-1])
        why = f"{what} cannot be imported: {type(e).__name__}: {e} ({frame.filename}, line {frame.lineno})"
    raise ConfigError(why, hint="correct it; nothing has run")


# --- which text of a rule made a run --------------------------------------------------------------------------------------


class Source(TypedDict, total=False):
    """The text of a rule: a file or an installed package; of a notebook's class only the digest."""

    file: str
    package: str
    sha256: str


_LOADED: dict[str, Source] = {}
"""Module -> its text as it was loaded."""


def source_of(name: str) -> Source | None:
    """The text of a rule of her own, None of a built-in one."""
    if name in BUILT_IN:
        return None
    entry = RULES[name]
    module = str(getattr(entry, "__module__", ""))
    if module in _LOADED:
        return _LOADED[module]
    file = str(getattr(sys.modules.get(module), "__file__", None) or "")
    if digest := _of_module(module):
        return Source(file=Path(file).name, sha256=digest)
    return Source(sha256=_of_class(entry))


def source_line(name: str, source: Source) -> str:
    """In one line, for people."""
    where = source.get("file") or source.get("package") or "a class of the notebook or script"
    return f"{name}, {where}, sha256 {source['sha256']}"


def _digest(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()


def _of_module(module: str) -> str:
    """Of its file; nothing for a script or notebook that is run itself: it changes for many reasons."""
    file = Path(str(getattr(sys.modules.get(module), "__file__", None) or "/"))
    return _digest(file.read_bytes()) if module != "__main__" and file.is_file() else ""


def _of_class(entry: object) -> str:
    """Of what a class and those above it say that are not FedLoRA's: the text of each method, else its byte code; values."""
    said = []
    for one in getattr(entry, "__mro__", ()):
        if one is not object and not one.__module__.startswith("fedlora."):
            said += [f"{name} {_said(value)}" for name, value in sorted(vars(one).items()) if name not in _BY_PYTHON]
    return _digest("\n".join(said).encode())


_BY_PYTHON = ("__module__", "__dict__", "__weakref__", "__doc__", "__qualname__", "__firstlineno__", "__static_attributes__")


def _said(value: object) -> str:
    found = getattr(value, "__func__", value)
    code = getattr(found, "__code__", None)
    if code is None:
        return repr(value) if isinstance(value, str | int | float | bool | tuple | None) else type(value).__name__
    try:
        return inspect.getsource(code)
    except (OSError, TypeError):
        return _code(code)


def _code(code: Any) -> str:
    inner = [_code(one) if hasattr(one, "co_code") else repr(one) for one in code.co_consts]
    return f"{code.co_code.hex()} {code.co_names} {code.co_varnames} {inner}"
