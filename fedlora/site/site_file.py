"""The site file: what one site says of itself. Private; it never leaves."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from fedlora.core.plan import Digest, Hex, SiteName
from fedlora.core.section import Section
from fedlora.data.files.readers import BUILT_IN, READERS
from fedlora.data.files.sources import ENCODINGS
from fedlora.data.shapes import SHAPES
from fedlora.formats.plans import load_toml
from fedlora.site.policy import Policy, default_modes


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


def _encoding(name: str) -> str:
    if name != "auto" and name not in ENCODINGS:
        near = difflib.get_close_matches(name, ENCODINGS, n=1)
        more = f"did you mean {near[0]!r}?" if near else f"known: auto, {', '.join(ENCODINGS)}"
        raise PydanticCustomError("encoding", "{text}", {"text": f"no encoding is called {name[:80]!r}; {more}"})
    return name


class SiteData(Section):
    """This site's own rows. Nothing in this table is ever sent."""

    path: str | tuple[str, ...] = "data/train.jsonl"
    """training rows: file (JSONL, JSON, CSV, TSV, Parquet; .gz, .zst), directory, pattern or list; relative to this file"""
    held_out_path: str | tuple[str, ...] = ""
    """the same for rows that are evaluated on; empty: a fraction of path is held out by group"""
    format: Annotated[
        str, AfterValidator(_format), Field(description=f"file format: {', '.join(BUILT_IN)}; auto: what the suffix says")
    ] = "auto"
    shape: Annotated[
        str, AfterValidator(_shape), Field(description=f"how a row is laid out: {', '.join(SHAPES)}; auto: by its columns")
    ] = "auto"
    encoding: Annotated[
        str,
        AfterValidator(_encoding),
        Field(description="encoding of text files, e.g. cp1252; auto: a byte order mark, else UTF-8"),
    ] = "auto"
    header: bool = True
    """the first line of a CSV or TSV file names its columns; false: they are called 1, 2, 3 ... in columns and group_key"""
    max_bad_share: Annotated[float, Field(ge=0, le=1)] = 0.01
    """largest share of bad rows that are left out, named by line number; with more the data is refused. 0: none may be bad"""
    columns: dict[str, str] = Field(default_factory=dict)
    """our column name = the file's column name, e.g. { prompt = "question", completion = "answer" }"""
    group_key: str = ""
    """column that identifies the patient or customer; all rows of one group stay on the same side of the split"""
    special_tokens: Literal["text", "keep"] = "text"
    """strings such as <|im_end|> inside rows; text: ordinary characters; keep: special tokens, also where a user wrote them"""
    too_long: Literal["keep-answer", "cut", "drop"] = "keep-answer"
    """rows above max_length; keep-answer: cut the prompt, split long texts; cut: truncate on the right; drop: leave them out"""
    held_out_fraction: Annotated[float, Field(ge=0, le=0.9)] = 0.1
    """fraction of groups held out for evaluation"""

    def paths(self, root: Path) -> list[Path]:
        """Files, directories and patterns of the training rows."""
        return _paths(root, self.path)

    def held_out_paths(self, root: Path) -> list[Path]:
        """Files, directories and patterns of the rows for evaluation; empty: they are held out of the training rows."""
        return _paths(root, self.held_out_path)


def _paths(root: Path, said: str | tuple[str, ...]) -> list[Path]:
    return [root / path for path in ([said] if isinstance(said, str) else said) if path]


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
    roster: Hex = ""
    """digest of the roster that you approved after comparing it by telephone; secagg needs it"""
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
    local_port: Annotated[int, Field(ge=1024, le=65535)] = 9094
    """loopback port between the connection process and the training process"""
    data: SiteData = SiteData()
    policy: Policy = Policy()

    @property
    def agreed(self) -> Policy:
        """The policy with its accepted modes of protection filled in."""
        if self.policy.protect:
            return self.policy
        return self.policy.model_copy(update={"protect": default_modes(roster=bool(self.roster))})


def load_site_file(path: Path) -> SiteFile:
    """Reads a site file.

    Raises:
        ConfigError: unreadable, not TOML, or with every wrong key named.
    """
    return load_toml(path, SiteFile)
