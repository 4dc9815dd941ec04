"""What is wrong in a file of tables, in words, with the way to what was meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from typing import Any, Final, get_args

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from fedlora.core.errors import ConfigError, plain
from fedlora.core.section import SITE_NAME, WORDS, Section, site_name
from fedlora.core.tagged import Tagged
from fedlora.core.told import lists

MOVED: Final = {
    "training.max_steps": "use federation.local_steps, the number of steps in one round",
    "training.num_train_epochs": "use federation.local_epochs, the number of epochs in one round",
    "federation.max_steps": "use federation.local_steps",
    "lora.rank": "use lora.r",
    "lora.alpha": "use lora.lora_alpha",
    "lora.rank_pattern": "one r for all modules: factors of different alpha / r cannot be averaged",
    "lora.alpha_pattern": "one lora_alpha for all modules: factors of different alpha / r cannot be averaged",
    "lora.use_dora": "DoRA's magnitudes are not linear in the update and cannot be averaged",
    "lora.init_lora_weights": "the first adapter comes from run.seed so that every site has the same one",
    "lora.modules_to_save": "only LoRA factors are sent",
    "aggregate.svd_every": "say every in [aggregate.fedsvd]",
}
SITES: Final = frozenset([
    "activation_checkpointing", "ca", "data", "device", "gpu_memory_gib", "gpus", "keep_dequantized", "key", "local_port",
    "micro_batch_tokens", "models", "name", "node_key", "plans", "policy", "roster", "server", "server_key", "state", "threads",
    "uncovers",
])  # fmt: skip
"""What a site file has and a plan has not; a test compares it with both."""
PLANS: Final = frozenset([
    "aggregate", "audit", "evaluation", "federation", "lora", "model", "protect", "run", "server_optimizer", "simulation",
    "training", "wire",
])  # fmt: skip
"""The other way round."""
_ROWS: Final = "the rows of a simulation are in [simulation.data], those of a site in [data] of its own site.toml"


def readable(error: ValidationError, section: type[Section], name: str) -> ConfigError:
    """Everything that validation has found, in words."""
    found = error.errors(include_url=False)
    lines = [said for e in found if (said := _line(e, section))]
    plans = ["simulation" if "simulation" in e["loc"][:1] else "plan --all" for e in found]
    wanted = " and ".join(
        f"`fedlora new {kind}`" for kind in dict.fromkeys(plans if "simulation" in section.model_fields else ["site"])
    )
    hint = f"{wanted}: every key with its meaning"
    return ConfigError(f"{name}: " + "; ".join(dict.fromkeys(lines)), hint=hint)


def _line(e: ErrorDetails, section: type[Section]) -> str:
    at = [plain(x) for x in e["loc"]]
    dotted = ".".join(at)
    if (said := _in_list(e, section)) is not None:
        return said
    if e["type"] == "string_pattern_mismatch":
        return f"{dotted}: {_in_words(e['ctx']['pattern'], e['input'])}"
    if not isinstance(e["input"], dict) and "object" in e["msg"] and (said := _no_table(at, section)):
        return said
    if e["type"] != "extra_forbidden":
        said = f"{e['msg'][0].lower()}{e['msg'][1:]}"
        return f"{dotted}: {said}" if dotted else said
    if dotted in MOVED:
        return f"{dotted}: {MOVED[dotted]}"
    table: type[Section] | None = section
    for key in at[:-1]:
        table = below(table, key) if table is not None else None
    if table is None:
        return f"{dotted}: unknown key"
    if issubclass(table, Tagged) and (owners := [n for n in table.registry if at[-1] in table.registry[n].Settings.model_fields]):
        tables = " or ".join(f"[{'.'.join([*at[:-1], name])}]" for name in owners)
        return f"{dotted}: move this key to the table {tables}"
    known = sorted(set(table.model_fields) - {"settings"} if issubclass(table, Tagged) else table.model_fields)
    if len(at) == 1 and (elsewhere := _other_file(dotted, section, e["input"])):
        return f"{dotted}: unknown key; {elsewhere}"
    if meant := homes(section, at[-1]):
        return f"{dotted}: unknown key; did you mean {' or '.join(meant)}?"
    near = difflib.get_close_matches(at[-1], known, n=1)
    return f"{dotted}: unknown key" + (f"; did you mean {near[0]!r}?" if near else f" (known: {', '.join(known)})")


def field_of(section: type[Section], keys: Sequence[str]) -> FieldInfo | None:
    """A key with its tables; None: it is unknown."""
    table: type[Section] | None = section
    for key in keys[:-1]:
        table = below(table, key) if table is not None else None
    return table.model_fields.get(keys[-1]) if table is not None and keys else None


def _in_list(e: ErrorDetails, section: type[Section]) -> str | None:
    """What is wrong in a key that takes a list; empty: another of its errors says it; None: it takes none."""
    at = e["loc"]
    for end in range(len(at), 0, -1):
        keys = [str(one) for one in at[:end]]
        if (field := field_of(section, keys)) is not None:
            return lists.line(e, field, ".".join(map(plain, keys)), at[end:]) if lists.takes_list(field) else None
    return None


def _no_table(at: list[str], section: type[Section]) -> str:
    """What to say instead, where a table stands and no value; empty: there stands none."""
    table: type[Section] | None = section
    for key in at:
        table = below(table, key) if table is not None else None
    if table is None:
        return ""
    dotted = ".".join(at)
    if issubclass(table, Tagged):
        return f"{dotted}: this is a table; what it chooses is {dotted}.{table.chooses}, one of {', '.join(table.registry)}"
    return f"{dotted}: this is a table; its keys are {', '.join(f'{dotted}.{key}' for key in table.model_fields)}"


def _other_file(key: str, section: type[Section], value: Any) -> str:
    """Where a key belongs that the other kind of file has at its top; empty: nowhere, or this one has it further down."""
    plan = "simulation" in section.model_fields
    if plan and key == "data":
        return _ROWS
    if homes(section, key) and not isinstance(value, dict):
        return ""
    if plan and key in SITES:
        return "it belongs to a site's own site.toml: `fedlora new site` prints one"
    if not plan and key in PLANS and "policy" in section.model_fields:
        return "it belongs to the coordinator's plan: `fedlora new plan --all` prints one"
    return ""


def homes(section: type[Section], name: str) -> list[str]:
    """The whole names of the keys with this last word, of those the nearest to the top alone."""
    found = [key for key in _keys(section, "") if key.rpartition(".")[2] == name]
    least = min((key.count(".") for key in found), default=0)
    return [key for key in found if key.count(".") == least]


def _keys(section: type[Section], at: str) -> Iterator[str]:
    names = list(section.model_fields)
    if issubclass(section, Tagged):
        names = [n for n in names if n != "settings"] + list(section.registry)
    for name in names:
        yield f"{at}{name}"
        kind = below(section, name)
        yield from _keys(kind, f"{at}{name}.") if kind is not None else ()


def _in_words(pattern: str, said: str) -> str:
    """What may stand where a text does not fit, and for the name of a site what comes next to it."""
    if pattern == SITE_NAME and (near := site_name(said)):
        return f"{plain(said)[:80]!r} cannot stand there: {WORDS[pattern]}; {near!r} can"
    return WORDS.get(pattern, f"the text must match {pattern}")


def below(table: type[Section], key: str) -> type[Section] | None:
    """The table of this name in a table; None: there is none."""
    if key in table.model_fields:
        kind = table.model_fields[key].annotation
        found = [k for k in (kind, *get_args(kind)) if isinstance(k, type) and issubclass(k, Section)]
        return found[0] if found else None
    if issubclass(table, Tagged) and key in table.registry:
        settings: type[Section] = table.registry[key].Settings
        return settings
    return None
