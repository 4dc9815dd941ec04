"""`fedlora export` and `fedlora verify`: what is published of a run, and whether a server has signed it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from fedlora.cli.output import Json, emit

Best = Annotated[
    bool, typer.Option("--best", help="The adapter with the least held-out loss of all sites together, not the last.")
]
Round = Annotated[
    int | None,
    typer.Option(
        "--round", min=0, help="The adapter after so many rounds; the last three and the best are kept.", show_default=False
    ),
]


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
    best: Best = False,
    round: Round = None,
    json: Json = False,
) -> None:
    """Write a standard PEFT adapter, an adapter for llama.cpp, or a merged model.

    An adapter of a run in a server's directory (HOME/runs/NAME) is signed with the server's key; see `verify`.

    Example: fedlora export runs/clinical/seed-0 adapter/
    """
    from fedlora.formats.files import refuse_existing
    from fedlora.lab.claims import not_one
    from fedlora.library.leakage import inside
    from fedlora.library.publish import export_run, exported_lines
    from fedlora.rounds.store import RunStore

    which = _which(best=best, round=round)
    refuse_existing(out)
    held = run.is_file() or any(map(RunStore.holds, [run, *inside(run)]))
    if not held and (why := not_one(run, wanted="adapter")) is not None:
        raise why
    done = export_run(run, out, dtype=dtype, to=to, merge=merge, base=base, with_base=with_base, round=which)
    emit(done, exported_lines(done, to=to, merge=merge, with_base=with_base), as_json=json)


def verify(
    directory: Annotated[Path, typer.Argument(help="Directory that `fedlora export` has made.")],
    server: Annotated[Path, typer.Option(help="The server's public key, server.pub; not one from that directory.")],
    json: Json = False,
) -> None:
    """Check that a server has signed a published adapter, and that every file is the one it signed.

    Example: fedlora verify adapter/ --server keys/server.pub
    """
    from fedlora.answers import Verified
    from fedlora.formats.keys import load_public
    from fedlora.library.signed import verify as check_signed

    key = load_public(server)
    found = check_signed(directory, key)
    facts = Verified(fingerprint=key.fingerprint(), files=sorted(found.files), trained=found.trained)
    text = f"{len(found.files)} files as signed by the server with fingerprint {key.fingerprint()}: {directory}"
    emit(facts, [text], as_json=json)


def pull(
    home: Annotated[Path, typer.Argument(help="The server's directory, from `fedlora server init`.")],
    run: Annotated[str, typer.Argument(help="Name of the run.")],
    out: Annotated[Path, typer.Argument(help="Directory to create.")],
    best: Best = False,
    round: Round = None,
    json: Json = False,
) -> None:
    """Write the adapter of a run as a signed PEFT adapter; the run may go on.

    `fedlora export HOME/runs/NAME` does the same, and more kinds.

    Example: fedlora server pull study my-run adapter/ --best
    """
    from fedlora.library.publish import export_run, exported_lines

    done = export_run(home / "runs" / run, out, dtype="bfloat16", round=_which(best=best, round=round))
    emit(done, exported_lines(done, to="peft", merge=False, with_base=False), as_json=json)


def _which(*, best: bool, round: int | None) -> int | Literal["best", "last"]:
    from fedlora.core.errors import ConfigError

    if best and round is not None:
        raise ConfigError("--best and --round each name another adapter", hint="give one of them")
    return "best" if best else "last" if round is None else round
