"""The plan: everything the federation agrees on. Strict, frozen, every error at once; its SHA-256 names it.

Key names are other people's where they exist: PEFT's, transformers' and TRL's, bitsandbytes', Flower's. What spans
rounds is ours. A field's docstring is its comment in the sample file that ``fedlora new`` prints.
"""

from __future__ import annotations

import hashlib
from calendar import monthrange
from collections.abc import Iterator
from typing import Annotated, Any, Final, Literal, Self, TypeVar

from pydantic import AfterValidator, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from fedlora.core.canonical import canonical
from fedlora.core.errors import ConfigError
from fedlora.core.limits import MAX_PLAN_BYTES, MAX_RANK, MAX_SITES
from fedlora.core.registry import MODES, OPTIMIZERS, RULES
from fedlora.core.section import Section, worded
from fedlora.core.tables.audit import Audit, audit_misfits
from fedlora.core.tables.privacy import Privacy, private_misfits
from fedlora.core.tables.simulation import Simulation
from fedlora.core.tagged import Tagged
from fedlora.core.told.wrong_keys import readable

Digest = Annotated[str, worded(r"^[0-9a-f]{64}$", "a digest has 64 characters: 0-9, a-f")]
Hex = Annotated[str, worded(r"^([0-9a-f]{64})?$", "a digest has 64 characters, 0-9 and a-f, or is empty")]
Name = Annotated[str, Field(max_length=200)]
Share = Annotated[float, Field(ge=0, le=1)]
Dtype = Literal["float32", "bfloat16", "int8"]
"""Types of values on their way."""
Listed = TypeVar("Listed")
Metric = Literal["train/loss", "eval/nll", "eval/exact_match", "eval/coarse_match", "eval/tokens", "eval/examples"]


Block = Annotated[int, Field(ge=0, lt=10_000)]
Blocks = Annotated[
    str, worded(r"^(all|(upper|lower):(0\.\d{1,6}|1(\.0{1,6})?))$", "all, upper:SHARE or lower:SHARE, as upper:0.5")
]


def _once(listed: Listed) -> Listed:
    if isinstance(listed, tuple) and len(set(listed)) < len(listed):
        raise PydanticCustomError("twice", "one of its values stands in it twice")
    return listed


class Run(Section):
    """Name of the run, and the seed of all its randomness."""

    name: Annotated[str, worded(r"^[a-z0-9][a-z0-9-]{0,62}$", "1 to 63 characters: a-z, 0-9, and - but not first")] = "my-run"
    """names directories and report pages: a-z, 0-9 and -"""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """public; initial adapter, data order, dropout and the draw of sites are derived from it"""


class Model(Section):
    """The base model. It never changes during a run."""

    model_name_or_path: Annotated[str, Field(min_length=1, max_length=200)] = "HuggingFaceTB/SmolLM2-135M-Instruct"
    """public model id; each site names its local copy in its site file"""
    revision: Name = "main"
    """commit or tag of the model; recorded in the published adapter"""
    digest: Hex = ""
    """content digest of weights, tokenizer, chat template and quantization; `fedlora pin` fills it in"""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """data type of the weights that are not quantized"""
    load_in_4bit: bool = True
    """quantize the linear layers to 4 bits"""
    load_in_8bit: bool = False
    """quantize the linear layers to 8 bits instead"""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """4-bit data type"""
    bnb_4bit_use_double_quant: bool = True
    """quantize the block scales too (double quantization)"""
    bnb_4bit_compute_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """data type of matrix products; use float32 on CPUs without bfloat16"""

    @property
    def quantization(self) -> str:
        """Data type that the linear layers are quantized to: nf4, fp4, int8 or none."""
        return self.bnb_4bit_quant_type if self.load_in_4bit else "int8" if self.load_in_8bit else "none"

    @model_validator(mode="after")
    def _one_width(self) -> Self:
        if self.load_in_4bit and self.load_in_8bit:
            raise PydanticCustomError("both", "load_in_4bit and load_in_8bit exclude each other")
        if self.model_name_or_path.startswith(("/", ".", "~")):
            raise PydanticCustomError("path", "model_name_or_path is a public id; the path belongs into the site file")
        return self


class Lora(Section):
    """The adapter. Keys have PEFT's names."""

    r: Annotated[int, Field(ge=1, le=MAX_RANK)] = 16
    """rank"""
    lora_alpha: Annotated[int, Field(ge=1, le=4096)] = 32
    """scaling: B @ A is multiplied by lora_alpha / r"""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """dropout probability on the adapter's input during training"""
    target_modules: Annotated[tuple[Name, ...] | Literal["all-linear"], AfterValidator(_once)] = "all-linear"
    """names of the modules that get an adapter, or all-linear"""
    layers_to_transform: Annotated[tuple[Block, ...] | Blocks, AfterValidator(_once)] = "all"
    """which blocks get one: all, a share (upper:0.5, lower:0.25), or their numbers from 0; fewer blocks, fewer bytes"""
    use_rslora: bool = False
    """scale by lora_alpha / sqrt(r) instead"""
    ranks: dict[Name, Annotated[int, Field(ge=1, le=MAX_RANK)]] = Field(default_factory=dict)
    """site = rank, for sites that train fewer rank components than r; needs aggregate.name product and protect.mode sealed"""
    init: Hex = ""
    """digest of an earlier run's adapter, with which this run begins; `fedlora pin --init` fills it in. Empty: a new one"""
    init_digest: Hex = ""
    """digest of the initial adapter; `fedlora pin` fills it in"""

    @model_validator(mode="after")
    def _one_rank(self) -> Self:
        if self.ranks and max(self.ranks.values()) > self.r:
            raise PydanticCustomError("ranks", "lora.ranks: the rank of a site must not exceed lora.r")
        if self.init and self.init_digest not in ("", self.init):
            raise PydanticCustomError("init", "lora.init and lora.init_digest name different adapters: use `fedlora pin --init`")
        if self.target_modules == ():
            raise PydanticCustomError("targets", "target_modules is empty; name modules or say 'all-linear'")
        if self.layers_to_transform == () or (self.layers_to_transform[:6] in ("upper:", "lower:") and self.block_share == 0):
            raise PydanticCustomError("blocks", "layers_to_transform names no block; say 'all', a share above 0, or numbers")
        return self

    @property
    def block_share(self) -> float:
        """The share of blocks that ``upper:`` or ``lower:`` names; 1 of all."""
        chosen = self.layers_to_transform
        return float(chosen.partition(":")[2] or 1) if isinstance(chosen, str) else 1.0

    @property
    def scale(self) -> float:
        """alpha / r, or alpha / sqrt(r) under rsLoRA; no unit."""
        return float(self.lora_alpha / (self.r**0.5 if self.use_rslora else self.r))


class Training(Section):
    """Local training. Keys have the names of transformers and TRL. The schedule spans the whole run, not one round."""

    learning_rate: Annotated[float, Field(gt=0, le=1)] = 2e-4
    """peak learning rate"""
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    """learning rate schedule over the whole run"""
    warmup_ratio: Share = 0.03
    """fraction of the run's steps over which the learning rate rises linearly from zero"""
    per_device_train_batch_size: Annotated[int, Field(ge=1, le=4096)] = 8
    """rows in a batch; with packing, each row holds up to max_length tokens of several examples"""
    gradient_accumulation_steps: Annotated[int, Field(ge=1, le=4096)] = 1
    """batches in one optimizer step"""
    max_length: Annotated[int, Field(ge=8, le=1 << 20)] = 1024
    """tokens in a row; data.too_long of a site says what happens to longer examples"""
    template_date: Annotated[str, worded(r"^\d{4}-\d{2}-\d{2}$", "a date is year-month-day, as 2026-01-31")] = "2026-01-01"
    """date, YYYY-MM-DD, that a chat template sees as today, so that every site has the same tokens on every day"""
    prompt: Literal["any", "chat", "plain"] = "any"
    """what all sites' rows are: chat, plain (text as it stands) or any; others are left out, and the published adapter says it"""
    packing: bool = True
    """fill each row with several examples, none of which sees another, where the base keeps them apart; false: one in a row"""
    optim: Literal["adamw_torch", "paged_adamw_8bit", "paged_adamw_32bit"] = "adamw_torch"
    """optimizer; the paged ones need CUDA"""
    loraplus_lr_ratio: Annotated[float, Field(ge=1, le=64)] = 1.0
    """LoRA+: learning rate of B over that of A, which is learning_rate; in sealed mode without [privacy]"""
    weight_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """weight decay on the factors A and B"""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """gradients are clipped to this norm"""
    gradient_checkpointing: bool = False
    """minimum for sites with activation_checkpointing = auto: recompute all activations. Less memory, more time"""
    optimizer_state: Literal["reset", "keep"] = "reset"
    """Adam's moments at the start of a round: reset to zero, or kept from this site's last round"""
    proximal_mu: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    """FedProx: adds mu / 2 times the squared distance from the round's initial factors to the loss; 0: off"""

    @model_validator(mode="after")
    def _is_a_date(self) -> Self:
        year, month, day = map(int, self.template_date.split("-"))
        if not (year and 1 <= month <= 12 and 1 <= day <= monthrange(year, month)[1]):
            raise PydanticCustomError("date", "template_date is no day of the calendar")
        return self


class Federation(Section):
    """Rounds, and the sites that must take part in one."""

    num_rounds: Annotated[int, Field(ge=1, le=100_000)] = 10
    """rounds in the run"""
    local_steps: Annotated[int, Field(ge=0, le=1_000_000)] = 10
    """optimizer steps of a site in one round; 0: use local_epochs"""
    local_epochs: Annotated[int, Field(ge=0, le=1000)] = 0
    """passes over a site's own data in one round; 0: use local_steps"""
    min_sites: Annotated[int, Field(ge=1, le=MAX_SITES)] = 2
    """a round with fewer valid updates is void"""
    fraction_train: Annotated[float, Field(gt=0, le=1)] = 1.0
    """fraction of the connected sites drawn to train in each round, but min_sites at least"""
    round_deadline: Annotated[float, Field(gt=0, le=30 * 86400)] = 3600.0
    """seconds from the request to the last update that counts"""
    round_attempts: Annotated[int, Field(ge=1, le=100)] = 3
    """attempts at a round before the run stops; it can be resumed. What only people at a site can mend uses up none"""

    @model_validator(mode="after")
    def _steps(self) -> Self:
        if (self.local_steps > 0) == (self.local_epochs > 0):
            raise PydanticCustomError("steps", "set either local_steps or local_epochs, and the other to 0")
        return self


class Aggregate(Tagged):
    """How updates are combined into the next adapter. RULES.md says which rule suits what."""

    registry = RULES
    name: str = "fedavg"
    """aggregation rule, one of"""
    weighting: Literal["tokens", "examples", "uniform"] = "tokens"
    """a site's weight: supervised tokens used in the round, examples used, or 1 for every site"""
    max_weight: Annotated[int, Field(ge=0, le=1 << 26)] = 0
    """upper limit of one site's weight in tokens or examples; lower: large sites count less; 0: what the round's steps can use"""


class ServerOptimizer(Tagged):
    """Optimizer of the server. Its gradient is the aggregated update of the sites."""

    registry = OPTIMIZERS
    name: str = "none"
    """one of"""


class Wire(Section):
    """Data types of what is sent."""

    dtype: Dtype = "bfloat16"
    """data type of the values on their way, in either direction; int8 is the smallest"""


class Protect(Tagged):
    """Who can read an update."""

    registry = MODES
    chooses = "mode"
    mode: str = "sealed"
    """one of"""


class Evaluation(Section):
    """Metrics that sites compute on their own held-out rows."""

    every: Annotated[int, Field(ge=0)] = 1
    """evaluate the global adapter every n rounds, before training; 0: only after the last round"""
    coarse_chars: Annotated[int, Field(ge=0, le=64)] = 0
    """also count completions whose first n characters match; 0: off"""
    share: Annotated[tuple[Metric, ...], AfterValidator(_once)] = (
        "train/loss",
        "eval/nll",
        "eval/exact_match",
        "eval/tokens",
    )
    """metrics that are sent with an update; a site's policy may withhold some"""


_LATER: Final[dict[str, dict[str, Any]]] = {
    "lora": {"init": "", "layers_to_transform": "all"},
    "training": {"loraplus_lr_ratio": 1.0},
}
"""Keys that came when there were plans without them, with their default."""


class Plan(Section):
    """Everything that the sites agree on. The plan's SHA-256 identifies it. It holds no path, no device and no secret."""

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
    privacy: Privacy | None = None
    audit: Audit | None = None
    simulation: Simulation | None = None

    @model_validator(mode="after")
    def _rule_fits(self) -> Self:
        wrong = list(_misfits(self))
        if wrong:
            raise PydanticCustomError("rule", "{all}", {"all": "; ".join(wrong)})
        return self

    def canonical(self) -> bytes:
        """The agreed part as canonical JSON: sorted keys, no spaces, ASCII, no default left out. All but ``simulation``, and
        but ``privacy`` and ``audit`` where there is none, and keys of later releases at their default."""
        return canonical(self.agreed())

    def agreed(self) -> dict[str, Any]:
        """What :meth:`canonical` writes, as a table of tables."""
        absent: dict[str, Any] = {name: True for name in ("privacy", "audit") if getattr(self, name) is None}
        for name, keys in _LATER.items():  # plans that do not use them keep their digest
            absent[name] = {key for key, default in keys.items() if getattr(getattr(self, name), key) == default}
        return self.model_dump(mode="json", exclude={"simulation": True, **absent})

    def digest(self) -> str:
        """SHA-256 of :meth:`canonical`, hex."""
        return hashlib.sha256(self.canonical()).hexdigest()

    @property
    def is_pinned(self) -> bool:
        """Whether `fedlora pin` has filled in the digests of base and first adapter and, with [privacy], the noise."""
        noisy = self.privacy is None or self.privacy.noise_multiplier > 0
        return bool(self.model.digest and self.lora.init_digest) and noisy

    def pinned(self, *, base: str, init: str, earlier: bool = False) -> Plan:
        """This plan with the digests of the base and of the first adapter, perhaps an earlier run's, filled in."""
        model, first = self.model.model_copy(update={"digest": base}), {"init_digest": init, "init": init if earlier else ""}
        return self.model_copy(update={"model": model, "lora": self.lora.model_copy(update=first)})


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
    if plan.training.loraplus_lr_ratio != 1 and (mode.reveals == "sum" or plan.privacy is not None):
        yield (
            "training.loraplus_lr_ratio: the bounds on what a sum or a private step can hold are of one rate for A and B: set it "
            "to 1, or protect.mode = 'sealed' without [privacy]"
        )
    for entry in (rule, plan.server_optimizer.entry, mode):
        yield from entry.conflicts(plan)
    yield from private_misfits(plan)
    yield from audit_misfits(plan)


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


FIRST_KEYS: Final = frozenset(
    [
        "run.name",
        "model.model_name_or_path",
        "model.load_in_4bit",
        "lora.r",
        "lora.lora_alpha",
        "training.prompt",
        "training.learning_rate",
        "training.max_length",
        "training.per_device_train_batch_size",
        "federation.num_rounds",
        "federation.local_steps",
        "federation.min_sites",
        "federation.round_deadline",
        "aggregate.name",
        "protect.mode",
    ]
)
"""What most plans set. All other keys have defaults that fit most federations."""
