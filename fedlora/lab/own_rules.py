"""Aggregation rules of the researcher's own: from her script, or from a package that she has installed.

Only what she names on her own command line is loaded. A plan names a rule, and a plan may come from elsewhere: it never makes
anything be imported. In a deployment a rule has to be registered at every end by a script there.
"""

from __future__ import annotations

import importlib.util
import re
import sys
import traceback
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from fedlora.core.errors import ConfigError, FedLoRAError, RunFailed
from fedlora.core.registry import RULES

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
    """A plan whose rule is not there may mean one of hers."""
    try:
        yield
    except ConfigError as e:
        found = re.search(r"no rule is called '([^']*)'", str(e))
        if found is None:
            raise
        own = "a rule of your own: --rule FILE.py, or the name of an installed one"
        raise ConfigError(str(e), hint=_ELSEWHERE.get(found[1].lower(), own)) from None


@contextmanager
def own_errors() -> Iterator[None]:
    """What her own code raises is no bug of FedLoRA: she needs the place and the text.

    Raises:
        RunFailed: in place of it.
    """
    try:
        yield
    except FedLoRAError:
        raise
    except Exception as e:
        places = [
            (f.f_code.co_filename, line) for f, line in traceback.walk_tb(e.__traceback__) if f.f_globals["__name__"] in _OWN
        ]
        if not places:
            raise
        file, line = places[-1]
        why = f"the rule of your own fails: {type(e).__name__}: {e} ({file}, line {line})"
        raise RunFailed(why, hint="correct it, and go on with --resume") from e


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
    try:
        _tried(f"--rule {file}", lambda: spec.loader.exec_module(found))
        _check_registered(file, set(RULES.names()) - before)
    except BaseException:  # or a notebook that asks again would find the module there, and take it for whole
        del sys.modules[module]
        for name in set(RULES.names()) - before:
            RULES.forget(name)
        raise


def _check_registered(file: Path, names: Collection[str]) -> None:
    if not names:
        raise ConfigError(f"--rule {file} registers no rule", hint='a class with @fedlora.RULES.register("my-rule") above it')
    for name in names:
        if not callable(getattr(RULES[name], "finish", None)):
            raise ConfigError(f"--rule {file}: the rule {name!r} has no method finish", hint=_EXAMPLE)


def _from_package(name: str) -> None:
    installed = {point.name: point for point in entry_points(group=GROUP)}
    if name not in installed:
        known = f"installed are {', '.join(sorted(installed))}" if installed else f"no package has the group {GROUP!r}"
        raise ConfigError(
            f"--rule {name}: no installed package has a rule of this name; {known}", hint="a script: --rule FILE.py"
        )
    rule = _tried(f"--rule {name}", installed[name].load)
    _OWN.add(str(getattr(rule, "__module__", "")))
    if name not in RULES:
        RULES.register(name, rule)
    elif RULES[name] is not rule:
        raise ConfigError(f"--rule {name}: a rule of this name is there already", hint="rename the entry point of the package")


def _tried(what: str, load: Any) -> Any:
    try:
        return load()
    except ConfigError:
        raise
    except Exception as e:  # her own code, on her own machine: she needs the place and the text
        frame = traceback.extract_tb(e.__traceback__)[-1]
        why = f"{what} cannot be imported: {type(e).__name__}: {e} ({frame.filename}, line {frame.lineno})"
    raise ConfigError(why, hint="correct it; nothing has run")
