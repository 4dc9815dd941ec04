"""How an adapter has to be asked, and how it was trained: ``prompt.json`` and ``fedlora_run.json`` of FORMAT.md, 11.4."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from fedlora.core.claims import PrivacyClaim
from fedlora.core.plan import Digest
from fedlora.core.records import Count, Filed, Record
from fedlora.core.tables.audited import AuditRecord


class Example(Record):
    """A question and an answer that FedLoRA made up, as a trained adapter would get and give them."""

    prompt: str
    """the text, as it stands before the answer; what the tokenizer itself puts before any text is left out"""
    completion: str
    """the answer, with the token that ends it"""


class Prompt(Filed):
    """``prompt.json``, beside a pinned plan and in a run's directory: how its adapters have to be asked."""

    FORMAT: ClassVar[int] = 1

    format: Literal[1] = 1
    kind: Literal["any", "chat", "plain"]
    """``training.prompt`` of the plan; ``any``: the plan does not say"""
    max_length: Annotated[int, Field(ge=1)]
    """most tokens of a row in training, prompt and answer together"""
    template: Digest | None
    """SHA-256 of the base's chat template, UTF-8; null: it has none, or the base was not looked at"""
    stop: tuple[str, ...] | None
    """tokens that end an answer, sorted; null: the base was not looked at"""
    example: Example | None
    """null: ``any``, or the base was not looked at"""


class RunFacts(Filed):
    """How an adapter was trained: sites by number, never by name."""

    FORMAT: ClassVar[int] = 4

    format: Literal[4] = 4
    of: Literal["federation", "site"]
    """whose adapter it is: everybody's, or one site's own under ``aggregate.fedavg.share = 'A'``"""
    run: str
    """run id"""
    plan: Digest
    """plan digest"""
    base: str
    """base digest"""
    adapter: Digest
    """adapter digest, of the float32 values before they were rounded to ``dtype``"""
    aggregate: str
    """the rule's name"""
    protection: str
    """the protection mode's name"""
    seed: Count
    rounds: Count | None
    """rounds that were done; null for a site's own adapter"""
    complete: bool | None
    """whether these are all rounds of the plan; null for a site's own adapter"""
    sites: Count | None
    """how many sites counted in some round; null if not known"""
    share: str
    """the factors that sites send: ``AB``, ``A`` or ``B``"""
    prompt: Prompt
    """how it has to be asked"""
    privacy: PrivacyClaim | None
    """null: no differential privacy"""
    audit: AuditRecord | None
    """null: no leakage audit of this adapter was known where it was written, as at a site"""


class Published(RunFacts):
    """``fedlora_run.json``, beside a published adapter."""

    dtype: Literal["bfloat16", "float16"]
    """type of the published weights"""
