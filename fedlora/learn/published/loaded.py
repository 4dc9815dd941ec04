"""A base with a published adapter on it, by PEFT itself."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.core.errors import ModelError
from fedlora.core.plan import Plan
from fedlora.formats.files import Damaged
from fedlora.formats.published.directory import AGAIN, made_for
from fedlora.formats.published.records import Prompt, Published
from fedlora.formats.records import parse_text
from fedlora.learn.base import load_base, machine_for
from fedlora.learn.bases.digest import has_digest
from fedlora.learn.bases.libraries import peft


@dataclass(frozen=True, slots=True)
class Loaded:
    """What answers.

    Attributes:
        model: PEFT's, on its device, in evaluation.
        tokenizer: the base's.
        prompt: how the adapter has to be asked.
    """

    model: Any
    tokenizer: Any
    prompt: Prompt

    @property
    def stops(self) -> list[int]:
        """Ids that end an answer, sorted."""
        ids = {self.tokenizer.eos_token_id, *(self.tokenizer.convert_tokens_to_ids(word) for word in self.prompt.stop or ())}
        return sorted(i for i in ids if isinstance(i, int))

    @property
    def pad(self) -> int | None:
        """Id that fills short rows up."""
        found: int | None = self.tokenizer.pad_token_id
        return found if found is not None else self.tokenizer.eos_token_id


def load(adapter: Path, base: Path) -> Loaded:
    """Puts a published adapter on its base.

    Args:
        adapter: a PEFT directory, as `fedlora export` and `fedlora site pull` make it.
        base: the base model's directory, in full precision.

    Raises:
        StoreError: no adapter there, or it is damaged.
        ModelError: no base there, or the adapter is of another one, also where only the values of its weights differ.
    """
    name, run = made_for(adapter), _run(adapter)
    plan = Plan()
    loaded = load_base(plan.model, base, machine_for(plan))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft reads an attribute that transformers is renaming
            model = peft.PeftModel.from_pretrained(loaded.model, str(adapter)).eval()
    except (RuntimeError, ValueError) as e:
        raise ModelError(f"the adapter does not fit the base in {base}", hint=f"it was made for {name}") from e
    except Exception as e:  # whatever a library makes of files from elsewhere
        raise Damaged(f"PEFT cannot read the adapter in {adapter}: {type(e).__name__}", hint=AGAIN) from e
    if run is not None and run.base not in ("", loaded.digest) and not has_digest(loaded.directory, run.base):
        raise ModelError(
            f"the base in {base} is not the one that the adapter was trained on: {loaded.digest[:12]}, not {run.base[:12]}",
            hint=f"it was made for {name}, whose files `fedlora pin` has read",
        )
    return Loaded(model, loaded.tokenizer, _prompt(run))


def _run(adapter: Path) -> Published | None:
    """How the adapter was trained; None: another program has made it."""
    file = adapter / "fedlora_run.json"
    return parse_text(Published, file.read_bytes(), where=str(file), hint=AGAIN) if file.is_file() else None


def _prompt(run: Published | None) -> Prompt:
    """How the adapter has to be asked."""
    if run is None:
        return Prompt(kind="any", max_length=Plan().training.max_length, template=None, stop=None, example=None)
    return run.prompt
