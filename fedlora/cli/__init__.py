"""The command ``fedlora``: parse, call the library, print. Heavy imports live inside commands."""

from __future__ import annotations

import os
import sys
import traceback

from fedlora.cli.output import fail

__all__ = ["main"]


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
    )
    import click

    from fedlora.cli.commands import app
    from fedlora.errors import FedLoRAError

    words = sys.argv[1:] if argv is None else argv
    try:
        status = app(words, standalone_mode=False, prog_name="fedlora")
    except FedLoRAError as e:
        return fail(str(e), hint=e.hint, code=e.code, status=e.exit_status, as_json="--json" in words)
    except click.exceptions.Abort:
        return fail("interrupted", hint="the same command with --resume goes on", code="interrupted", status=130)
    except KeyboardInterrupt:
        return fail("interrupted", hint="the same command with --resume goes on", code="interrupted", status=130)
    except click.ClickException as e:
        e.show()
        return e.exit_code
    except MemoryError:
        return fail("out of memory", hint="a smaller batch or a shorter max_length", code="resources", status=7)
    except Exception as e:  # the end of the road: whatever it is, it is ours, and it has its own exit status
        traceback.print_exc()
        hint = "this is a bug of FedLoRA; the lines above name no data unless the last one does: read it before you send it"
        return fail(f"unexpected {type(e).__name__}", hint=hint, code="bug", status=70, as_json="--json" in words)
    return int(status or 0)
