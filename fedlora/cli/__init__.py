"""The command ``fedlora``: parse, call the library, print. Heavy imports live inside commands."""

from __future__ import annotations

import errno
import functools
import os
import re
import sys
import traceback
from typing import TYPE_CHECKING

from fedlora.cli.output import command_of, fail, say_error
from fedlora.cli.terminal import READER_GONE

if TYPE_CHECKING:
    import click

_TRAIN = frozenset(["accelerate", "bitsandbytes", "gguf", "peft", "pyarrow", "tokenizers", "torch", "transformers"])
_SIGNALED = 130
_INTERRUPTED = {
    "simulate": "run the same command with --resume to continue",
    "compare-rules": "run the same command with --resume to continue",
    "server": "the run continues while the server is up; if the server was stopped, run `fedlora server start ... --resume`",
    "site": "run the same command to continue: finished work is kept in the journal",
}


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit status: 0 done, 1 run failed, 2 usage, 3 set-up, 4 connection, 5 refused,
    6 quorum, 7 resources, 70 bug, 130 interrupted."""
    # Before anything imports flwr or transformers: nothing of ours phones home, no base comes from a hub.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.update(
        FLWR_TELEMETRY_ENABLED="0",
        FLWR_DISABLE_UPDATE_CHECK="1",
        HF_HUB_DISABLE_TELEMETRY="1",
        HF_HUB_DISABLE_PROGRESS_BARS="1",
        TOKENIZERS_PARALLELISM="false",
        TQDM_DISABLE="1",  # a bar moves the cursor
    )
    import click

    from fedlora.cli.asking import Declined
    from fedlora.core.errors import FedLoRAError

    READER_GONE.clear()  # of a command before this one, in a program that runs several
    words, program = sys.argv[1:] if argv is None else argv, _program()
    command = command_of(words, program) if "--json" in _options(words) else None  # as which a program is answered
    try:
        status = int(program.main(words, standalone_mode=False, prog_name="fedlora") or 0)
        return _interrupted(words, command) if status == _SIGNALED else status  # typer has swallowed Ctrl-C by then
    except FedLoRAError as e:
        return fail(str(e), hint=e.hint, code=e.code, status=e.exit_status, command=command)
    except Declined as e:
        return fail(f"{e}: nobody has said yes", hint="", code="declined", status=e.status, command=command)
    except (click.exceptions.Abort, KeyboardInterrupt):
        return _interrupted(words, command)
    except click.exceptions.NoArgsIsHelpError as e:
        if command is None:
            sys.stderr.write(f"{e.format_message()}\n")  # the help, which is ours
            return e.exit_code
        return _usage(e, command, command)
    except click.ClickException as e:
        return _usage(e, command_of(words, program), command)
    except MemoryError:
        return fail("out of memory", hint="use a smaller batch or max_length", code="resources", status=7, command=command)
    except ImportError as e:
        if (e.name or "").partition(".")[0] not in _TRAIN:
            raise
        hint = "pip install 'fedlora[train]', or run this command on a machine that has it; no other command of a server needs it"
        return fail(f"{e.name} is not installed", hint=hint, code="not-installed", status=3, command=command)
    except OSError as e:
        full = e.errno in (errno.ENOSPC, errno.EDQUOT)
        where = f"{e.filename}: " if e.filename else ""
        hint = "free some disk space, then run the command again" if full else "check the path and its permissions"
        return fail(f"{where}{e.strerror or e}", hint=hint, code="os", status=7 if full else 3, command=command)
    except Exception as e:  # the end of the road: whatever it is, it is ours, and it has its own exit status
        say_error(traceback.format_exc().rstrip())
        hint = "this is a bug of FedLoRA: report the lines above. Before you send them, check that the last line quotes no data"
        return fail(f"unexpected {type(e).__name__}", hint=hint, code="bug", status=70, command=command)


@functools.cache
def _program() -> click.Command:
    """All commands: from their functions' signatures, which takes longer than most of them."""
    import typer

    from fedlora.cli.commands import app
    from fedlora.cli.help import restore

    program = typer.main.get_command(app)
    restore(program)
    return program


def _options(words: list[str]) -> list[str]:
    """What may be an option: after ``--`` there are only arguments."""
    return words[: words.index("--")] if "--" in words else words


_NEAR = re.compile(r" \(?(Did you mean [^?]*\?)\)?")


def _usage(e: click.ClickException, called: str, command: str | None) -> int:
    """A command line that is wrong, answered as every other error."""
    hint, text = f"fedlora {called} --help".replace("  ", " "), e.format_message()
    if text.startswith("No such") and (near := _NEAR.findall(text)):  # click says it, and typer says it again
        text = f"{_NEAR.sub('', text)} {near[0]}"
    return fail(text, hint=hint, code="usage", status=e.exit_code, command=command)


def _interrupted(words: list[str], command: str | None) -> int:
    if READER_GONE:
        return _SIGNALED
    hint = _INTERRUPTED.get(words[0] if words else "", "")
    return fail("interrupted", hint=hint, code="interrupted", status=_SIGNALED, command=command)
