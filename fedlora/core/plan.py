"""The plan (shared, hashed) and the site file (private): strict, frozen, every error at once.

Key names are other people's where they exist: PEFT's, transformers' and TRL's, bitsandbytes', Flower's. What spans
rounds is ours. A field's docstring is its comment in the sample files that ``fedlora new`` prints.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from fedlora.core.errors import ConfigError, PlanRefused

__all__ = [
    "Plan",
    "Policy",
    "SiteFile",
    "canonical",
    "dump_toml",
    "load_plan",
    "load_site_file",
    "parse_plan",
    "sample",
]

Hex = Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
SiteName = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")]
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Metric = Literal["train/loss", "eval/nll", "eval/exact_match", "eval/coarse_match", "eval/tokens", "eval/examples"]
MAX_PLAN_BYTES = 65_536


class Section(BaseModel):
    """A table of a file."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, allow_inf_nan=False)


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

    r: Annotated[int, Field(ge=1, le=512)] = 16
    """rank"""
    lora_alpha: Annotated[int, Field(ge=1, le=4096)] = 32
    """the product is scaled by lora_alpha / r"""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """dropout on the adapter's input while training"""
    target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    """module names, or all-linear"""
    use_rslora: bool = False
    """scale by lora_alpha / sqrt(r) instead"""
    rank_pattern: dict[str, int] = {}
    """refused for now"""
    alpha_pattern: dict[str, int] = {}
    """refused for now"""
    ranks: dict[str, Annotated[int, Field(ge=1, le=512)]] = {}
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
    min_sites: Annotated[int, Field(ge=1, le=256)] = 2
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


class Aggregate(Section):
    """How updates become the next adapter; which rule when: the documentation."""

    name: Literal["fedavg", "ffa", "rolora", "fedsvd", "product", "robust"] = "fedavg"
    """rule; fedavg: weighted mean of the changes of A and of B"""
    weighting: Literal["tokens", "examples", "uniform"] = "tokens"
    """a site's weight: supervised tokens used in the round, examples used, or 1"""
    max_weight: Annotated[int, Field(ge=0, le=1 << 26)] = 0
    """most tokens or examples that one site may weigh in a round; 0: all that the steps can use; lower: none decides alone"""
    share: Literal["AB", "A"] = "AB"
    """fedavg: factors that travel; A: each site keeps a B of its own, and there is no global adapter"""
    svd_every: Annotated[int, Field(ge=1, le=100_000)] = 1
    """fedsvd: rounds from one decomposition to the next"""
    rank: Literal["r", "r_max", "energy", "full"] = "r"
    """product: rank of the next adapter: lora.r, up to max_rank, what keeps the share energy, or all of it"""
    max_rank: Annotated[int, Field(ge=0, le=512)] = 0
    """product: for rank r_max and energy; 0: twice lora.r"""
    energy: Annotated[float, Field(gt=0, lt=1)] = 0.99
    """product: share of squared singular values that rank = energy keeps in every module"""
    gauge: Literal["balanced", "procrustes"] = "balanced"
    """product: how it is split; procrustes: turned towards the mean factors"""
    statistic: Literal["median", "trimmed", "multi-krum", "clip"] = "clip"
    """robust: what takes the place of the mean"""
    trim: Annotated[float, Field(ge=0, lt=0.5)] = 0.1
    """robust, trimmed: share of the sites left out at either end of each value"""
    byzantine: Annotated[int, Field(ge=1, le=126)] = 1
    """robust, multi-krum: how many sites may lie"""


class ServerOptimizer(Section):
    """A step of the server along what the sites moved."""

    name: Literal["none", "sgd", "fedavgm", "nesterov", "fedadam"] = "none"
    """none: the sites' mean as it is. The others do not go with rules that split the product anew: fedsvd, product"""
    learning_rate: Annotated[float, Field(gt=0, le=100)] = 1.0
    """of the server; fedadam: about the size of a typical change, 1e-3 to 1e-2"""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """fedavgm and nesterov"""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """fedadam"""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """fedadam"""
    tau: Annotated[float, Field(gt=0, le=1)] = 1e-3
    """fedadam: keeps the division finite"""


class Wire(Section):
    """Numbers that weigh less."""

    dtype: Literal["float32", "bfloat16", "int8"] = "bfloat16"
    """type of the values of an update on its way to the server"""


class Protect(Section):
    """Who can read an update."""

    mode: Literal["sealed", "secagg"] = "sealed"
    """sealed: encrypted to the aggregator and signed by the site; secagg: the aggregator learns the sum and nothing else"""
    profile: Literal["int4", "int8", "int12", "int16", "int24"] = "int8"
    """secagg: levels of a value; in 12, 16, 20, 24 or 32 bits on the wire. int12 or more if weights differ; int24 for audits"""
    weight_unit: Annotated[int, Field(ge=0, le=1 << 26)] = 0
    """secagg: tokens or examples that make a weight of 1; weights are whole, at most 16. 0: weighting is uniform"""
    first_range: Annotated[float, Field(ge=0, le=64)] = 0.0
    """secagg: largest change of a value that the first round expects; 0: learning_rate x local_steps. Later ones know better"""
    max_colluding: Annotated[int, Field(ge=1, le=85)] = 1
    """secagg: so many sites in league with the server learn nothing of the others; a round needs three times as many"""
    lone_change: Literal["refuse", "allow"] = "refuse"
    """secagg: refuse: no two sums of this plan from which, with max_colluding sites, one site's update follows; allow: any"""
    phase_deadline: Annotated[float, Field(gt=0, le=86400)] = 300.0
    """secagg: seconds for each step after training; the longest one sends the masked update"""


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
    aggregate: Aggregate = Aggregate()
    server_optimizer: ServerOptimizer = ServerOptimizer()
    wire: Wire = Wire()
    protect: Protect = Protect()
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

    @property
    def first_range(self) -> float:
        """Secure aggregation: change of a value for which the levels stand in the first round."""
        return self.protect.first_range or self.training.learning_rate * self.federation.local_steps

    def pinned(self, *, base: str, init: str) -> Plan:
        """This plan with the digests of the base and of the first adapter filled in."""
        model = self.model.model_copy(update={"digest": base})
        return self.model_copy(update={"model": model, "lora": self.lora.model_copy(update={"init_digest": init})})


_OWN: Final = (
    (
        "aggregate",
        "name",
        {
            "fedavg": ("share",),
            "fedsvd": ("svd_every",),
            "product": ("rank", "max_rank", "energy", "gauge"),
            "robust": ("statistic", "trim", "byzantine"),
        },
    ),
    ("aggregate", "weighting", {"tokens": ("max_weight",), "examples": ("max_weight",)}),
    ("aggregate", "rank", {"r_max": ("max_rank",), "energy": ("max_rank", "energy")}),
    ("aggregate", "statistic", {"trimmed": ("trim",), "multi-krum": ("byzantine",)}),
    (
        "server_optimizer",
        "name",
        {
            "sgd": ("learning_rate",),
            "fedavgm": ("learning_rate", "momentum"),
            "nesterov": ("learning_rate", "momentum"),
            "fedadam": ("learning_rate", "beta1", "beta2", "tau"),
        },
    ),
    (
        "protect",
        "mode",
        {"secagg": ("profile", "weight_unit", "max_colluding", "lone_change", "first_range", "phase_deadline")},
    ),
)
"""Of a table: the key that decides, and which other keys mean anything under which of its values."""


def _idle(plan: Plan) -> Iterator[str]:
    """What a plan sets although nothing would read it."""
    said = set()
    for table, by, owners in _OWN:
        section = getattr(plan, table)
        chosen, default = getattr(section, by), type(section)()
        for key in sorted({k for keys in owners.values() for k in keys}):
            of = [value for value, keys in owners.items() if key in keys]
            if chosen in of or (table, key) in said or getattr(section, key) == getattr(default, key):
                continue
            said.add((table, key))
            needed = " or ".join(map(repr, of))
            yield f"{table}.{key} belongs to {table}.{by} = {needed}, this plan says {chosen!r}: leave it out"


def _misfits(plan: Plan) -> Iterator[str]:
    """What in a plan does not go together, each in a sentence that says what to do."""
    a, o, p, f = plan.aggregate, plan.server_optimizer, plan.protect, plan.federation
    secagg = p.mode == "secagg"
    yield from _idle(plan)
    if secagg and f.min_sites < (least := max(3, 3 * p.max_colluding)):
        yield f"protect.mode = 'secagg' needs federation.min_sites >= {least}: 3, and three times protect.max_colluding"
    if secagg and (a.weighting == "uniform") == (p.weight_unit > 0):
        yield (
            "protect.mode = 'secagg': set protect.weight_unit (tokens or examples that make a weight of 1), or "
            "aggregate.weighting = 'uniform'; not both"
        )
    if f.local_epochs and a.weighting != "uniform" and not a.max_weight:
        yield (
            f"aggregate.weighting = {a.weighting!r} with local_epochs needs aggregate.max_weight: how many steps a site takes "
            "depends on its rows, so that nothing else bounds what it may claim"
        )
    if secagg and f.local_epochs and not p.first_range:
        yield "protect.mode = 'secagg' with local_epochs needs protect.first_range"
    if secagg and f.fraction_train < 1 and p.lone_change == "refuse":
        yield (
            "federation.fraction_train below 1 draws other sites for each round, protect.lone_change = 'refuse' wants the same "
            "ones: choose federation.fraction_train = 1, or lone_change = 'allow' in the plan and in every site's policy"
        )
    if a.name == "robust" and secagg:
        yield (
            "aggregate.name = 'robust' needs every single update, protect.mode = 'secagg' shows only their sum: choose "
            "aggregate.name = 'fedavg', or protect.mode = 'sealed'"
        )
    if a.name == "product" and secagg:
        yield (
            "aggregate.name = 'product' needs every single update, protect.mode = 'secagg' shows only their sum: choose 'ffa', "
            "'rolora' or 'fedsvd', which are exact from sums, or protect.mode = 'sealed'"
        )
    if secagg and "eval/coarse_match" in plan.evaluation.share and not plan.evaluation.coarse_chars:
        yield (
            "evaluation.share lists eval/coarse_match, which nobody measures without evaluation.coarse_chars: under "
            "protect.mode = 'secagg' every site has to send all that is listed"
        )
    if a.gauge == "procrustes" and (a.rank != "r" or plan.lora.ranks):
        yield "aggregate.gauge = 'procrustes' mixes the slots: it goes with aggregate.rank = 'r' and no lora.ranks"
    if a.name == "robust" and a.statistic == "multi-krum" and f.min_sites < 2 * a.byzantine + 3:
        yield (
            f"aggregate.statistic = 'multi-krum' against {a.byzantine} liars needs federation.min_sites >= "
            f"{2 * a.byzantine + 3}: twice aggregate.byzantine and three"
        )
    if plan.lora.ranks and secagg:
        yield (
            "lora.ranks under protect.mode = 'secagg': no rule that sees sums alone takes sites of different rank: leave "
            "lora.ranks out, or choose protect.mode = 'sealed' with aggregate.name = 'product'"
        )
    elif plan.lora.ranks and a.name != "product":
        yield f"lora.ranks: aggregate.name = {a.name!r} cannot average different ranks: choose 'product', or leave lora.ranks out"
    if a.name in ("fedsvd", "product") and o.name != "none":
        yield (
            f"server_optimizer.name = {o.name!r}: aggregate.name = {a.name!r} splits the product into other factors each round, "
            "in which a change of the old ones means nothing: choose server_optimizer.name = 'none'"
        )
    if a.name in ("fedsvd", "product", "rolora") and plan.training.optimizer_state == "keep":
        yield (
            f"training.optimizer_state = 'keep': under aggregate.name = {a.name!r} the moments of the last round belong to other "
            "factors: choose 'reset'"
        )


class Policy(Section):
    """What this site agrees to. It wins over every plan."""

    approve: Literal["by-digest", "any-within-policy"] = "by-digest"
    """by-digest: only runs of `plans` above; any-within-policy: all within this table, in which then every key has to stand"""
    allowed_models: tuple[str, ...] = ()
    """base models by id; empty: only those under [models]"""
    protect: tuple[Literal["sealed", "secagg"], ...] = ()
    """accepted protections; empty: secagg alone where `roster` is set, else sealed"""
    min_sites: Count = 2
    """smallest min_sites of a plan"""
    max_rounds: Count = 1000
    """most rounds in a run"""
    max_local_steps: Count = 100_000
    """most steps in a round"""
    max_request_bytes: Annotated[int, Field(ge=1 << 16, le=1 << 34)] = 1 << 30
    """largest message from the server"""
    max_first_range: Annotated[float, Field(gt=0, le=64)] = 1.0
    """secagg: largest change of a value for which a plan's first round may set its levels; the larger, the coarser they are"""
    lone_change: Literal["refuse", "allow"] = "refuse"
    """secagg: refuse: only plans that say so too; allow: also those whose sums may differ by one site"""
    share: tuple[Metric, ...] = get_args(Metric)
    """numbers that may leave; sealed: others are dropped without a word to the server; secagg: a plan with others is refused"""

    @model_validator(mode="after")
    def _all_said(self) -> Self:
        if self.approve == "any-within-policy" and (missing := self._unsaid()):
            raise PydanticCustomError(
                "unsaid",
                "approve = 'any-within-policy' takes every plan within these limits, so each of them has to stand here; missing: "
                "{keys}",
                {"keys": ", ".join(missing)},
            )
        return self

    def _unsaid(self) -> list[str]:
        return [
            key for key in type(self).model_fields if key not in self.model_fields_set or (key == "protect" and not self.protect)
        ]

    def refusals(self, plan: Plan, *, models: frozenset[str]) -> list[str]:
        """Why this site would not take part in a plan, each in a sentence; none if it would.

        Args:
            models: ids of the base models that lie here.
        """
        f, p, accepted = plan.federation, plan.protect, self.protect or ("secagg",)
        allowed = frozenset(self.allowed_models) or models
        no = []
        if plan.model.model_name_or_path not in allowed:
            no.append(f"base model {plan.model.model_name_or_path!r} is not among {sorted(allowed)}")
        if p.mode not in accepted:
            no.append(f"protection {p.mode!r} is not among {list(accepted)}")
        if f.min_sites < self.min_sites:
            no.append(f"min_sites {f.min_sites} is below {self.min_sites}")
        if f.num_rounds > self.max_rounds:
            no.append(f"{f.num_rounds} rounds are more than {self.max_rounds}")
        if f.local_steps > self.max_local_steps:
            no.append(f"{f.local_steps} steps a round are more than {self.max_local_steps}")
        if not plan.model.digest or not plan.lora.init_digest:
            no.append("the plan pins neither base nor first adapter by content")
        return [*no, *(self._secagg_refusals(plan) if p.mode == "secagg" else ())]

    def _secagg_refusals(self, plan: Plan) -> Iterator[str]:
        if plan.first_range > self.max_first_range:
            yield f"the first range {plan.first_range:g} is above max_first_range {self.max_first_range:g}"
        if plan.protect.lone_change == "allow" and self.lone_change == "refuse":
            yield "protect.lone_change = 'allow': two sums may show one site's update, and policy.lone_change says 'refuse'"
        if kept := sorted(set(plan.evaluation.share) - set(self.share)):
            yield (
                f"evaluation.share lists {', '.join(kept)}, which policy.share does not: under secagg a number leaves from all "
                "sites or from none, for what one site alone sends no sum hides"
            )

    def check(self, plan: Plan, *, models: frozenset[str]) -> None:
        """Agrees to a plan or says why not.

        Raises:
            PlanRefused: with every reason.
        """
        if no := self.refusals(plan, models=models):
            raise PlanRefused("; ".join(no), hint="change [policy] in the site file, or talk to the coordinator")


class SiteData(Section):
    """The site's own rows. Nothing of this table ever leaves."""

    path: str = "data/train.jsonl"
    """JSONL, JSON, CSV or Parquet; relative to this file"""
    held_out_path: str = ""
    """rows for evaluation; empty: a share of path is held out by group"""
    format: Literal["auto", "jsonl", "json", "csv", "parquet"] = "auto"
    """file format"""
    shape: Literal["auto", "messages", "prompt-completion", "text", "alpaca", "sharegpt"] = "auto"
    """how a row is laid out"""
    columns: dict[str, str] = {}
    """our name = the file's name, e.g. { prompt = "question", completion = "answer" }"""
    group_key: str = ""
    """column that names the patient or customer: no group stands on both sides of the split"""
    held_out_fraction: Annotated[float, Field(ge=0, le=0.9)] = 0.1
    """share of groups held out for evaluation"""


class SiteFile(Section):
    """One site's own file. It never leaves."""

    name: str = "st-marys"
    """this site's name, as enrolled: a-z, 0-9 and -"""
    server: str = "fed.example.org:8443"
    """host and port of the aggregation server: the only address this site ever connects to"""
    ca: str = "keys/ca.crt"
    """certificate authority of the server; relative to this file, like every path here"""
    server_key: str = "keys/server.pub"
    """the server's public key, pinned; compare its fingerprint over the telephone"""
    roster: Hex = ""
    """digest of the federation's roster that you have approved, compared over the telephone; secagg needs it"""
    plans: tuple[Digest, ...] = ()
    """plans that you have approved, by digest; each entry is for one run. `fedlora site approve` shows a plan and adds it"""
    uncovers: dict[Digest, tuple[SiteName, ...]] = {}
    """plan = sites whose update its sums may show beside sums of earlier plans; `fedlora site approve --uncovers` adds them"""
    key: str = "keys/st-marys.key"
    """this site's private key"""
    node_key: str = "keys/st-marys.node.key"
    """this site's private key for the connection"""
    state: str = "state"
    """directory for the journal"""
    models: dict[str, str] = {"HuggingFaceTB/SmolLM2-135M-Instruct": "models/SmolLM2-135M-Instruct"}
    """where the base models lie: public id = directory or GGUF file"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where to train"""
    gpus: Annotated[int, Field(ge=0, le=64)] = 0
    """GPUs of this machine that train together; 0: all that are visible"""
    gpu_memory_gib: Annotated[float, Field(ge=0, le=1024)] = 0.0
    """most memory to take on each of them, GiB; 0: what is free"""
    activation_checkpointing: Literal["auto", "none", "selective", "full"] = "auto"
    """computed again instead of kept: nothing, all but products, all; auto: measured. More if memory runs out"""
    micro_batch_tokens: Annotated[int, Field(ge=0, le=1 << 20)] = 0
    """most tokens at once, an example at least; a step stays what it is; 0: measured on a GPU"""
    threads: Annotated[int, Field(ge=0, le=1024)] = 0
    """CPU threads; 0: all"""
    keep_dequantised: bool = False
    """hold the 4-bit values dequantised in the compute type: same bits, faster on a CPU, four times the memory"""
    local_port: Annotated[int, Field(ge=1024, le=65535)] = 9094
    """loopback port between the connection process and the training process"""
    data: SiteData = SiteData()
    policy: Policy = Policy()

    @property
    def agreed(self) -> Policy:
        """The policy with the protections that it accepts written out."""
        if self.policy.protect:
            return self.policy
        return self.policy.model_copy(update={"protect": ("secagg",) if self.roster else ("sealed",)})


# --- files ----------------------------------------------------------------------------------------------------

S = TypeVar("S", bound=Section)

_MOVED = {
    "training.max_steps": "it would mean one round's steps; say federation.local_steps",
    "training.num_train_epochs": "it would mean one round's epochs; say federation.local_epochs",
    "federation.max_steps": "say federation.local_steps",
    "lora.rank": "say lora.r",
    "lora.alpha": "say lora.lora_alpha",
    "lora.use_dora": "DoRA's magnitudes are not linear in the update and cannot be averaged",
    "lora.init_lora_weights": "the first adapter comes from run.seed so that every site has the same one",
    "lora.modules_to_save": "only LoRA factors travel",
}


def canonical(value: Any) -> bytes:
    """JSON with one spelling: sorted keys, no spaces, ASCII, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def load_plan(path: Path) -> Plan:
    """Reads a plan file.

    Raises:
        ConfigError: unreadable, not TOML, or with every wrong key named.
    """
    return _load(path, Plan)


def load_site_file(path: Path) -> SiteFile:
    """Reads a site file.

    Raises:
        ConfigError: as :func:`load_plan`.
    """
    return _load(path, SiteFile)


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
        raise _readable(e, Plan, "plan") from None
    if plan.canonical() != blob:
        raise ConfigError("the plan is not canonical", hint="server and site run different versions of FedLoRA")
    return plan


def _load(path: Path, section: type[S]) -> S:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        hint = "`fedlora new plan` and `fedlora new site` print samples"
        raise ConfigError(f"cannot read {path}: {e.strerror}", hint=hint) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path} is not TOML: {e}") from None
    try:
        # By way of JSON, because strict validation then takes a list where a tuple is declared.
        return section.model_validate_json(json.dumps(table, default=str))
    except ValidationError as e:
        raise _readable(e, section, str(path)) from None


def _readable(error: ValidationError, section: type[Section], name: str) -> ConfigError:
    lines = [_line(e, section) for e in error.errors(include_url=False, include_input=False)]
    hint = "`fedlora new plan|site` prints every key with its meaning"
    return ConfigError(f"{name}: " + "; ".join(dict.fromkeys(lines)), hint=hint)


def _line(e: ErrorDetails, section: type[Section]) -> str:
    at = [str(x) for x in e["loc"]]
    dotted = ".".join(at)
    if e["type"] != "extra_forbidden":
        return f"{dotted or 'file'}: {e['msg'][0].lower()}{e['msg'][1:]}"
    if dotted in _MOVED:
        return f"{dotted}: {_MOVED[dotted]}"
    table: Any = section
    for key in at[:-1]:
        table = getattr(table.model_fields[key].default, "__class__", None) if key in table.model_fields else None
        if not (isinstance(table, type) and issubclass(table, Section)):
            return f"{dotted}: unknown key"
    near = difflib.get_close_matches(at[-1], table.model_fields, n=1)
    known = f"; did you mean {near[0]!r}?" if near else f" (known: {', '.join(sorted(table.model_fields))})"
    return f"{dotted}: unknown key{known}"


# --- samples ---------------------------------------------------------------------------------------------------


def sample(section: type[Section]) -> str:
    """A commented TOML file with every key at its default, made from the model so that it cannot go stale."""
    return dump_toml(section())


def dump_toml(value: Section) -> str:
    """The same, with this file's values."""
    section = type(value)
    title = {"Plan": "plan.toml", "SiteFile": "site.toml"}.get(section.__name__, section.__name__)
    lines = [f"# {title}: {section.__doc__ or ''}".rstrip(), "# A key that is left out stands at its default.", ""]
    _describe(value, lines, "")
    return "\n".join(lines).rstrip() + "\n"


def _describe(value: Section, lines: list[str], prefix: str) -> None:
    for key, field in type(value).model_fields.items():
        item = getattr(value, key)
        if not isinstance(item, Section) and item is not None:
            lines.append(f"{key} = {_toml(item)}".ljust(56) + f"  # {field.description}")
    for key in type(value).model_fields:
        item = getattr(value, key)
        if isinstance(item, Section):
            lines += ["", f"[{prefix}{key}]  # {(type(item).__doc__ or '').splitlines()[0]}"]
            _describe(item, lines, f"{prefix}{key}.")


def _toml(value: Any) -> str:
    if isinstance(value, tuple | list):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(k)} = {_toml(v)}" for k, v in value.items()) + " }" if value else "{}"
    return json.dumps(value)
