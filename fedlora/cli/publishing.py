"""`fedlora export` and `fedlora verify`: what is published of a run, and whether a server has signed it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from fedlora.cli.output import Json, emit


def export(
    run: Annotated[
        Path, typer.Argument(help="Seed directory of a simulation, run directory of a server, or a site's own adapter file.")
    ],
    out: Annotated[Path, typer.Argument(help="Directory to create.")],
    dtype: Annotated[Literal["bfloat16", "float16"], typer.Option(help="Data type of the exported weights.")] = "bfloat16",
    to: Annotated[
        Literal["peft", "gguf"], typer.Option(help="peft: for transformers, PEFT and vLLM; gguf: for llama.cpp, needs --base.")
    ] = "peft",
    merge: Annotated[
        bool, typer.Option("--merge", help="Write the base model with the adapter merged into it, not an adapter.")
    ] = False,
    base: Annotated[
        Path | None,
        typer.Option(help="Directory of the full-precision base model; needed by --merge and --to gguf.", show_default=False),
    ] = None,
    with_base: Annotated[
        bool, typer.Option("--with-base", help="With --to gguf: also write the base model, in bfloat16, as base.gguf.")
    ] = False,
    json: Json = False,
) -> None:
    """Write a standard PEFT adapter, an adapter for llama.cpp, or a merged model.

    An adapter of a run in a server's directory (HOME/runs/NAME) is signed with the server's key; see `verify`.

    Example: fedlora export runs/clinical/seed-0 adapter/
    """
    from fedlora.library.publish import export_run, exported_text

    done = export_run(run, out, dtype=dtype, to=to, merge=merge, base=base, with_base=with_base)
    emit(done, exported_text(done, to=to, merge=merge, with_base=with_base), as_json=json)


def verify(
    directory: Annotated[Path, typer.Argument(help="Directory that `fedlora export` has made.")],
    server: Annotated[Path, typer.Option(help="The server's public key, server.pub; not one from that directory.")],
    json: Json = False,
) -> None:
    """Check that a server has signed a published adapter, and that every file is the one it signed.

    Example: fedlora verify adapter/ --server keys/server.pub
    """
    from fedlora.core.answers import Verified
    from fedlora.formats.keys import load_public
    from fedlora.library.signed import verify as check_signed

    key = load_public(server)
    found = check_signed(directory, key)
    facts = Verified(fingerprint=key.fingerprint(), files=sorted(found.files), trained=found.trained)
    text = f"{directory}: {len(found.files)} files as signed by the server with fingerprint {key.fingerprint()}"
    emit(facts, text, as_json=json)
