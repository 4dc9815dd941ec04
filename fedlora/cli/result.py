"""`fedlora site pull` and `fedlora try`: what a site has of a run."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from fedlora.cli.output import Json, emit
from fedlora.cli.standing import SiteArgument


def pull(
    file: SiteArgument = Path("site.toml"),
    out: Annotated[Path, typer.Option(help="Directory to create.")] = Path("adapter"),
    run: Annotated[str, typer.Option(help="First digits of the run's id; default: the last run that was done.")] = "",
    base: Annotated[
        Path | None,
        typer.Option(help="Directory of the base: then the stop tokens and an example stand beside it.", show_default=False),
    ] = None,
    json: Json = False,
) -> None:
    """Write the adapter of a run that this site took part in, as an ordinary PEFT directory.

    It came with the task of the last evaluation, signed by the server that this site pins, and is the adapter that the server
    publishes, bit for bit before it is rounded. Nothing is asked of the server.

    Example: fedlora site pull site.toml --out adapter
    """
    from fedlora.core.errors import StoreError
    from fedlora.library.publish import export_run
    from fedlora.site.site_file import load_site_file

    journal = file.resolve().parent / load_site_file(file).state / "journal"
    kept = sorted(journal.glob("*.safetensors"), key=lambda p: p.stat().st_mtime)
    fitting = [p for p in kept if p.stem.startswith(run)]
    if not fitting:
        known = ", ".join(p.stem[:12] for p in kept)
        raise StoreError(
            f"no run {run} has come to its end here; done are: {known}" if kept else "no run has come to its end here",
            hint="the adapter comes with the last evaluation; `fedlora site status` says how far a run is. A site that was away "
            "then asks the coordinator for it, who has it by `fedlora server pull`",
        )
    if run and len(fitting) > 1:
        names = ", ".join(sorted(p.stem[: len(run) + 8] for p in fitting))
        raise StoreError(f"{len(fitting)} runs begin with {run}", hint=f"more digits of the run's id, of one of: {names}")
    done = export_run(fitting[-1], out, dtype="bfloat16", base=base)
    lines = [
        f"written: {out}, the adapter of run {fitting[-1].stem[:12]}",
        f"is it better here: fedlora evaluate {out} --base BASE --on ROWS",
        f"try it: fedlora try {out} --base BASE --prompt '...'",
    ]
    emit(done, lines, as_json=json)


def try_adapter(
    adapter: Annotated[Path, typer.Argument(help="PEFT directory, from `fedlora site pull` or `fedlora export`.")],
    base: Annotated[Path, typer.Option(help="Directory of the base model, in full precision.")],
    prompt: Annotated[str, typer.Option(help="What to ask; -: read it from standard input.")],
    max_tokens: Annotated[int, typer.Option(min=1, max=4096, help="Longest answer, tokens.")] = 200,
    json: Json = False,
) -> None:
    """Ask the base model with an adapter on it one question, on this machine.

    The question is put as rows were trained: through the chat template, or as plain text. The answer is the most likely one, the
    same each time. Every user of this machine can see a command line: give what is about a patient or customer by --prompt -.

    Example: fedlora try adapter --base models/SmolLM2 --prompt - < note.txt
    """
    from fedlora.core.sites.facts import Tried
    from fedlora.formats.published.directory import check_there

    check_there(adapter, base)
    from fedlora.learn.published.ask import ask  # which takes seconds to load

    began = time.monotonic()
    prompt = _from_input() if prompt == "-" else prompt
    given, text, tokens = ask(adapter, base, prompt, max_tokens=max_tokens)
    found = Tried(prompt=given, text=text, tokens=tokens, seconds=time.monotonic() - began)
    emit(found, [f"  {line}" for line in text.split("\n")] + [f"({tokens} tokens in {found['seconds']:.0f} s)"], as_json=json)


def _from_input() -> str:
    """Standard input whole, but for a newline at its end."""
    import sys

    from fedlora.core.errors import ConfigError

    try:
        return sys.stdin.buffer.read().decode().removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError:
        raise ConfigError("--prompt -: standard input is no text in UTF-8", hint="save the file as UTF-8") from None
