"""The site file: what one site says of itself. Private; it never leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from fedlora.core.plan import Hex, SiteName
from fedlora.core.section import Section
from fedlora.data.readers import BUILT_IN, READERS
from fedlora.data.shapes import SHAPES
from fedlora.formats.plans import load_toml
from fedlora.site.policy import Policy

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def _format(name: str) -> str:
    if name != "auto" and name not in READERS:
        raise PydanticCustomError("format", "{text}, or auto", {"text": READERS.unknown(name)})
    return name


def _shape(name: str) -> str:
    if name != "auto" and name not in SHAPES:
        raise PydanticCustomError(
            "shape", "{text}", {"text": f"no shape is called {name[:80]!r}; known: auto, {', '.join(SHAPES)}"}
        )
    return name


class SiteData(Section):
    """The site's own rows. Nothing of this table ever leaves."""

    path: str = "data/train.jsonl"
    """JSONL, JSON, CSV, TSV or Parquet; relative to this file"""
    held_out_path: str = ""
    """rows for evaluation; empty: a share of path is held out by group"""
    format: Annotated[
        str, AfterValidator(_format), Field(description=f"file format: {', '.join(BUILT_IN)}; auto: what the suffix says")
    ] = "auto"
    shape: Annotated[
        str, AfterValidator(_shape), Field(description=f"how a row is laid out: {', '.join(SHAPES)}; auto: by its columns")
    ] = "auto"
    columns: dict[str, str] = Field(default_factory=dict)
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
    uncovers: dict[Digest, tuple[SiteName, ...]] = Field(default_factory=dict)
    """plan = sites whose update its sums may show beside sums of earlier plans; `fedlora site approve --uncovers` adds them"""
    key: str = "keys/st-marys.key"
    """this site's private key"""
    node_key: str = "keys/st-marys.node.key"
    """this site's private key for the connection"""
    state: str = "state"
    """directory for the journal"""
    models: dict[str, str] = Field(default={"HuggingFaceTB/SmolLM2-135M-Instruct": "models/SmolLM2-135M-Instruct"})
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


def load_site_file(path: Path) -> SiteFile:
    """Reads a site file.

    Raises:
        ConfigError: unreadable, not TOML, or with every wrong key named.
    """
    return load_toml(path, SiteFile)
