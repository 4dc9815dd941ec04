"""The site file: what one site says of itself. Private; it never leaves."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from fedlora.core.plan import Digest, Plan
from fedlora.core.section import Section, SiteName
from fedlora.core.tables.data import SiteData
from fedlora.formats.plans import load_toml
from fedlora.protect.modes import mode_of
from fedlora.site.policy import Policy, default_modes
from fedlora.site.private import SitePrivacy, private_refusals


def _unprivileged(port: int) -> int:
    if 0 < port < 1024:
        raise PydanticCustomError("port", "choose a port from 1024, or 0 for any free one: those below belong to the system")
    return port


def _read_aloud(text: str) -> str:
    """A digest without the blanks with which `fedlora roster show` prints it for the telephone."""
    digits = "".join(text.split()).lower()
    if digits and not re.fullmatch(r"[0-9a-f]{64}", digits):
        other = len(digits) - sum(d in "0123456789abcdef" for d in digits)
        said = f"{len(digits)} characters" + (f", {other} of them neither 0-9 nor a-f" if other else "")
        raise PydanticCustomError(
            "digest",
            "{text}",
            {"text": f"a digest has 64 digits, 0-9 and a-f, with or without blanks between groups; here are {said}"},
        )
    return digits


NO_ROSTER = "it needs a roster, and `roster` in the site file is empty"
SET_ROSTER = (
    "set `roster` to the digest that the coordinators read to you from `fedlora roster show`; a `site up` that runs without any "
    "has to be started again"
)


class SiteFile(Section):
    """Settings of one site. This file is never sent."""

    name: str = "st-marys"
    """this site's name as enrolled: a-z, 0-9 and -"""
    server: str = "fed.example.org:8443"
    """host:port of the aggregation server, the only address this site connects to"""
    ca: str = "keys/ca.crt"
    """certificate authority of the server; paths are relative to this file"""
    server_key: str = "keys/server.pub"
    """public key of the server, pinned; compare its fingerprint by telephone"""
    roster: Annotated[str, AfterValidator(_read_aloud)] = ""
    """digest of the roster that you approved after comparing it by telephone, blanks do not count; secagg needs it"""
    plans: tuple[Digest, ...] = ()
    """digests of the plans that you approved, one entry for each run; `fedlora site approve` shows a plan and adds it"""
    uncovers: dict[Digest, tuple[SiteName, ...]] = Field(default_factory=dict)
    """plan digest = sites whose single update may become visible, as you accepted with `fedlora site approve --uncovers`"""
    key: str = "keys/st-marys.key"
    """private key of this site"""
    node_key: str = "keys/st-marys.node.key"
    """private key of this site's connection"""
    state: str = "state"
    """directory for the journal and all else that must survive a restart"""
    models: dict[str, str] = Field(default={"HuggingFaceTB/SmolLM2-135M-Instruct": "models/SmolLM2-135M-Instruct"})
    """base models: public id = local directory or GGUF file"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """device for training; auto: cuda if there is one"""
    gpus: Annotated[int, Field(ge=0, le=64)] = 0
    """number of GPUs of this machine that train together; 0: all visible ones"""
    gpu_memory_gib: Annotated[float, Field(ge=0, le=1024)] = 0.0
    """memory limit on each GPU, GiB; 0: all that is free"""
    activation_checkpointing: Literal["auto", "none", "selective", "full"] = "auto"
    """none: keep all; selective: recompute norms and gates; full: recompute layers; auto: measure. Raised if memory runs out"""
    micro_batch_tokens: Annotated[int, Field(ge=0, le=1 << 20)] = 0
    """most tokens in one forward pass, one example at least; does not change the optimizer step; 0: measured on a GPU"""
    threads: Annotated[int, Field(ge=0, le=1024)] = 0
    """CPU threads; 0: all cores"""
    keep_dequantized: bool = False
    """keep the dequantized 4-bit weights in memory: same bits, faster on a CPU, four times the memory"""
    local_port: Annotated[int, Field(ge=0, le=65535), AfterValidator(_unprivileged)] = 0
    """loopback port between the connection process and the training process; 0: any free one, so that sites may share a host"""
    data: SiteData = SiteData()
    privacy: SitePrivacy = SitePrivacy()
    policy: Policy = Policy()

    @property
    def agreed(self) -> Policy:
        """The policy with its accepted modes of protection filled in."""
        if self.policy.protect:
            return self.policy
        return self.policy.model_copy(update={"protect": default_modes(roster=bool(self.roster))})

    def is_sample(self, key: Literal["server", "models", "data"]) -> bool:
        """Whether what a key points to is still that of the sample, so that waiting for it is in vain."""
        fields = SiteFile.model_fields
        return self.data.path == SiteData().path if key == "data" else bool(getattr(self, key) == fields[key].default)

    def lacks_roster(self, plan: Plan) -> bool:
        """Whether a plan needs a roster and nobody here has set one."""
        return mode_of(plan).needs_roster and not self.roster

    def refusals(self, plan: Plan) -> list[str]:
        """Reasons why this site would refuse a plan; a lacking roster is said as that, not as the mode that follows of it."""
        if not self.lacks_roster(plan):
            no = self.agreed.refusals(plan, models=frozenset(self.models)).values()
            return [*no, *private_refusals(plan, self.privacy, self.data)]
        return [NO_ROSTER, *self.model_copy(update={"roster": "0" * 64}).refusals(plan)]


def load_site_file(path: Path) -> SiteFile:
    """Reads a site file.

    Raises:
        ConfigError: unreadable, not TOML, or with every wrong key named.
    """
    return load_toml(path, SiteFile)
