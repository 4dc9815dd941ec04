"""The plan: everything the federation agrees on. Strict, frozen, every error at once; its SHA-256 names it.

Key names are other people's where they exist: PEFT's, transformers' and TRL's, bitsandbytes', Flower's. What spans
rounds is ours. A field's docstring is its comment in the sample file that ``fedlora new`` prints.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from fedlora.core.canonical import canonical
from fedlora.core.errors import ConfigError
from fedlora.core.limits import MAX_PLAN_BYTES, MAX_RANK, MAX_SITES
from fedlora.core.registry import MODES, OPTIMIZERS, RULES
from fedlora.core.section import Section
from fedlora.core.tagged import Tagged
from fedlora.core.toml import readable

Hex = Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")]
SiteName = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")]
Share = Annotated[float, Field(ge=0, le=1)]
Metric = Literal["train/loss", "eval/nll", "eval/exact_match", "eval/coarse_match", "eval/tokens", "eval/examples"]


class Run(Section):
    """What this run is called, and the seed from which all its randomness comes."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")] = "my-run"
    """names directories and pages; a-z, 0-9 and -"""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """public; first adapter, data order and dropout are derived from it"""


class Model(Section):
    """The base model, which never changes."""

    model_name_or_path: Annotated[str, Field(min_length=1, max_length=200)] = "HuggingFaceTB/SmolLM2-135M-Instruct"
    """public id; each site says in its own file where its copy lies"""
    revision: str = "main"
    """commit or tag, written into the published adapter"""
    digest: Hex = ""
    """content digest over weights, tokenizer, chat template and quantisation; `fedlora pin` fills it in"""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """type in which weights that are not quantised are held"""
    load_in_4bit: bool = True
    """hold the linear layers in 4 bits"""
    load_in_8bit: bool = False
    """hold them in 8 bits instead"""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """4-bit code"""
    bnb_4bit_use_double_quant: bool = True
    """quantise the block scales too"""
    bnb_4bit_compute_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """type in which products are computed; float32 on a CPU that has no others"""

    @model_validator(mode="after")
    def _one_width(self) -> Self:
        if self.load_in_4bit and self.load_in_8bit:
            raise PydanticCustomError("both", "load_in_4bit and load_in_8bit exclude each other")
        if self.model_name_or_path.startswith(("/", ".", "~")):
            raise PydanticCustomError("path", "model_name_or_path is a public id; the path belongs into the site file")
        return self


class Lora(Section):
    """The adapter, by PEFT's names."""

    r: Annotated[int, Field(ge=1, le=MAX_RANK)] = 16
    """rank"""
    lora_alpha: Annotated[int, Field(ge=1, le=4096)] = 32
    """the product is scaled by lora_alpha / r"""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """dropout on the adapter's input while training"""
    target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    """module names, or all-linear"""
    use_rslora: bool = False
    """scale by lora_alpha / sqrt(r) instead"""
    rank_pattern: dict[str, int] = Field(default_factory=dict)
    """refused for now"""
    alpha_pattern: dict[str, int] = Field(default_factory=dict)
    """refused for now"""
    ranks: dict[str, Annotated[int, Field(ge=1, le=MAX_RANK)]] = Field(default_factory=dict)
    """site = rank, for sites that train only the first slots; aggregate.name product, protect.mode sealed"""
    init_digest: Hex = ""
    """digest of the first adapter; `fedlora pin` fills it in"""

    @model_validator(mode="after")
    def _one_rank(self) -> Self:
        if self.rank_pattern or self.alpha_pattern:
            raise PydanticCustomError(
                "pattern",
                "rank_pattern and alpha_pattern are refused: factors of different alpha / r cannot be averaged, and no rule "
                "that may is built yet. Use one r and one lora_alpha",
            )
        if self.ranks and max(self.ranks.values()) > self.r:
            raise PydanticCustomError("ranks", "lora.ranks: lora.r is the largest rank, those of single sites are at most that")
        if self.target_modules == ():
            raise PydanticCustomError("targets", "target_modules is empty; name modules or say 'all-linear'")
        return self

    @property
    def scale(self) -> float:
        """alpha / r, or alpha / sqrt(r) under rsLoRA; no unit."""
        return float(self.lora_alpha / (self.r**0.5 if self.use_rslora else self.r))


class Training(Section):
    """Local training, by transformers' and TRL's names. The schedule spans the whole run, not a round."""

    learning_rate: Annotated[float, Field(gt=0, le=1)] = 2e-4
    """peak"""
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    """course of the learning rate over the whole run"""
    warmup_ratio: Share = 0.03
    """share of the whole run in which it rises from zero"""
    per_device_train_batch_size: Annotated[int, Field(ge=1, le=4096)] = 8
    """rows in a batch; with packing, a row holds max_length tokens of several examples"""
    gradient_accumulation_steps: Annotated[int, Field(ge=1, le=4096)] = 1
    """batches in a step"""
    max_length: Annotated[int, Field(ge=8, le=1 << 20)] = 1024
    """tokens in a row; longer examples are cut on the right"""
    packing: bool = True
    """fill rows with several examples that do not see each other"""
    optim: Literal["adamw_torch", "paged_adamw_8bit", "paged_adamw_32bit"] = "adamw_torch"
    """optimiser, by transformers' names; the paged ones need CUDA"""
    weight_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """of the factors"""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """gradients are clipped to this norm"""
    gradient_checkpointing: bool = False
    """recompute all activations wherever a site does not say otherwise: less memory, more time"""
    optimizer_state: Literal["reset", "keep"] = "reset"
    """Adam's moments at the start of a round: fresh, or this site's own of its last round"""
    proximal_mu: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    """FedProx: mu / 2 times the squared distance from the round's first factors is added to the loss"""


class Federation(Section):
    """Rounds and who must take part."""

    num_rounds: Annotated[int, Field(ge=1, le=100_000)] = 10
    """rounds in the run"""
    local_steps: Annotated[int, Field(ge=0, le=1_000_000)] = 10
    """optimiser steps a site takes in a round; 0: use local_epochs"""
    local_epochs: Annotated[int, Field(ge=0, le=1000)] = 0
    """passes over its data a site makes in a round instead"""
    min_sites: Annotated[int, Field(ge=1, le=MAX_SITES)] = 2
    """a round with fewer valid updates is void"""
    fraction_train: Annotated[float, Field(gt=0, le=1)] = 1.0
    """share of the sites at hand that train in a round, min_sites at least, drawn anew from run.seed each round"""
    round_deadline: Annotated[float, Field(gt=0, le=30 * 86400)] = 3600.0
    """seconds from the request to the last update that counts"""
    round_attempts: Annotated[int, Field(ge=1, le=100)] = 3
    """how often a void round is asked again before the run stops (and can be resumed)"""

    @model_validator(mode="after")
    def _steps(self) -> Self:
        if (self.local_steps > 0) == (self.local_epochs > 0):
            raise PydanticCustomError("steps", "say either local_steps or local_epochs, and 0 for the other")
        return self


class Aggregate(Tagged):
    """How updates become the next adapter; which rule when: the documentation."""

    registry = RULES
    name: str = "fedavg"
    """rule, one of"""
    weighting: Literal["tokens", "examples", "uniform"] = "tokens"
    """a site's weight: supervised tokens used in the round, examples used, or 1"""
    max_weight: Annotated[int, Field(ge=0, le=1 << 26)] = 0
    """most tokens or examples that one site may weigh in a round; 0: all that the steps can use; lower: none decides alone"""


class ServerOptimizer(Tagged):
    """A step of the server along what the sites moved."""

    registry = OPTIMIZERS
    name: str = "none"
    """one of"""


class Wire(Section):
    """Numbers that weigh less."""

    dtype: Literal["float32", "bfloat16", "int8"] = "bfloat16"
    """type of the values of an update on its way to the server"""


class Protect(Tagged):
    """Who can read an update."""

    registry = MODES
    chooses = "mode"
    mode: str = "sealed"
    """one of"""


class Evaluation(Section):
    """What sites measure on their own held-out rows."""

    every: Annotated[int, Field(ge=0)] = 1
    """evaluate the global adapter in every n-th round, before training; 0: only at the end"""
    coarse_chars: Annotated[int, Field(ge=0, le=64)] = 0
    """also count completions whose first n characters are right; 0: do not"""
    share: tuple[Metric, ...] = (
        "train/loss",
        "eval/nll",
        "eval/exact_match",
        "eval/tokens",
    )
    """numbers that travel with an update; a site's policy may strike some out"""


class Arm(Section):
    """Settings that one arm of a comparison has for itself."""

    learning_rate: Annotated[float, Field(gt=0, le=1)]
    """peak, tuned for this arm on validation"""


class Simulation(Section):
    """For `fedlora simulate` only: never part of the digest, refused in a deployment."""

    data: str = "toy"
    """directory with SITE.train.jsonl, SITE.test.jsonl ..., relative to the plan file; or toy: made on the spot"""
    sites: tuple[SiteName, ...] = ("site-1", "site-2", "site-3")
    """virtual sites; a name is the stem of its files"""
    base: str = "toy"
    """directory or GGUF file with the base model, relative to the plan file; or toy: a tiny random model, made on the spot"""
    keep_dequantised: bool = False
    """hold the 4-bit values dequantised in the compute type: same bits, faster on a CPU, four times the memory"""
    arms: tuple[Literal["base", "local", "federated", "pooled-steps", "pooled-tokens"], ...] = (
        "base",
        "local",
        "federated",
        "pooled-steps",
        "pooled-tokens",
    )
    """what to train and compare, at equal tokens"""
    local: Arm | None = None
    """own settings of the arms `local`"""
    pooled_steps: Arm | None = None
    """own settings of the arm `pooled-steps`: as many steps as a site, batches of all sites' size"""
    pooled_tokens: Arm | None = None
    """own settings of the arm `pooled-tokens`: as many steps as all sites together"""
    evaluate_on: Literal["validation", "test"] = "test"
    """split for the table of arms; tune on validation, read test once"""
    examples_per_site: Annotated[int, Field(ge=0)] = 0
    """evaluate on the first n examples of each site's split; 0: all"""


class Plan(Section):
    """Everything the federation agrees on. Its SHA-256 names it; it holds no path, no device and no secret."""

    run: Run = Run()
    model: Model = Model()
    lora: Lora = Lora()
    training: Training = Training()
    federation: Federation = Federation()
    aggregate: Aggregate = Field(default_factory=Aggregate)
    server_optimizer: ServerOptimizer = Field(default_factory=ServerOptimizer)
    wire: Wire = Wire()
    protect: Protect = Field(default_factory=Protect)
    evaluation: Evaluation = Evaluation()
    simulation: Simulation | None = None

    @model_validator(mode="after")
    def _rule_fits(self) -> Self:
        wrong = list(_misfits(self))
        if wrong:
            raise PydanticCustomError("rule", "{all}", {"all": "; ".join(wrong)})
        return self

    def canonical(self) -> bytes:
        """The agreed part (all but ``simulation``) as canonical JSON: sorted keys, no spaces, ASCII, no default left out."""
        return canonical(self.model_dump(mode="json", exclude={"simulation"}))

    def digest(self) -> str:
        """SHA-256 of :meth:`canonical`, hex."""
        return hashlib.sha256(self.canonical()).hexdigest()

    def pinned(self, *, base: str, init: str) -> Plan:
        """This plan with the digests of the base and of the first adapter filled in."""
        model = self.model.model_copy(update={"digest": base})
        return self.model_copy(update={"model": model, "lora": self.lora.model_copy(update={"init_digest": init})})


def _misfits(plan: Plan) -> Iterator[str]:
    """What in a plan does not go together, each in a sentence that says what to do."""
    a, p, f = plan.aggregate, plan.protect, plan.federation
    rule, mode = RULES[a.name], MODES[p.mode]
    if a.weighting == "uniform" and a.max_weight:
        yield "aggregate.max_weight belongs to weighting = 'tokens' or 'examples', this plan says 'uniform': leave it out"
    if f.local_epochs and a.weighting != "uniform" and not a.max_weight:
        yield (
            f"aggregate.weighting = {a.weighting!r} with local_epochs needs aggregate.max_weight: how many steps a site takes "
            "depends on its rows, so that nothing else bounds what it may claim"
        )
    if mode.reveals == "sum":
        shown = " or ".join(repr(name) for name in MODES if MODES[name].reveals == "each")
        if rule.needs == "each":
            yield (
                f"aggregate.name = {a.name!r} needs every single update, protect.mode = {p.mode!r} shows only their sum: choose "
                f"{rule.instead}, or protect.mode = {shown}"
            )
        if plan.lora.ranks:
            yield (
                f"lora.ranks under protect.mode = {p.mode!r}: no rule that sees sums alone takes sites of different rank: leave "
                f"lora.ranks out, or choose protect.mode = {shown} with aggregate.name = 'product'"
            )
    for entry in (rule, plan.server_optimizer.entry, mode):
        yield from entry.misfits(plan)


def parse_plan(blob: bytes) -> Plan:
    """Inverse of :meth:`Plan.canonical`, for a plan that came over the wire.

    Raises:
        ConfigError: too large, not valid, or not canonical (then its digest would name two plans).
    """
    if len(blob) > MAX_PLAN_BYTES:
        raise ConfigError(f"a plan has at most {MAX_PLAN_BYTES} bytes, this one {len(blob)}")
    try:
        plan = Plan.model_validate_json(blob)
    except ValidationError as e:
        raise readable(e, Plan, "plan") from None
    if plan.canonical() != blob:
        raise ConfigError("the plan is not canonical", hint="server and site run different versions of FedLoRA")
    return plan
