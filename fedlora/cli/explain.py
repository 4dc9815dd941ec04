"""`fedlora explain`: what each code of an error means and what to do, without a network."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import TYPE_CHECKING, Annotated, Final

import typer

from fedlora.cli.output import Json, emit
from fedlora.core.codes import REFUSES, policy_key

if TYPE_CHECKING:
    from fedlora.core.errors import ConfigError

STATUSES: Final = {
    0: "done",
    1: "the run failed, or the other side did something wrong",
    2: "the command line is wrong",
    3: "a file, the data or the set-up has to be changed",
    4: "the other side cannot be reached, or this site is not enrolled there",
    5: "refused by a site, or the two ends do not fit together",
    6: "too few sites",
    7: "memory or disk is full",
    70: "a bug of FedLoRA",
    130: "interrupted; the same command goes on, a simulation with --resume",
}
"""The exit statuses of every command."""

_TAMPERED = (
    "Its bytes were changed on the way, or come from something that is not FedLoRA.",
    "If it happens again, both ends compare `fedlora version`, and ask who stands between them.",
)
_OTHER = (
    "The message is meant for something else than this exchange; nobody can reuse what was sent once.",
    "Nothing, if it happens once, after a restart. Again: the coordinator compares run, plan and roster of both ends.",
)

_UNKNOWN_CAUSE = "look at the screen of the end that reported it: its text stays there, because it could quote data"

MEANINGS: Final[dict[str, tuple[str, str]]] = {
    # 2, 70, 130: of a command
    "usage": ("The command line is wrong.", "Run the command with --help."),
    "bug": ("FedLoRA failed in a way that nobody foresaw.", "Report the lines above it, after a look that they quote no data."),
    "interrupted": ("Somebody pressed Ctrl-C or stopped the process.",
                    "Run the same command again, `simulate` and `compare-rules` with --resume: finished work is kept."),
    "declined": ("A person said no, or pressed Ctrl-C, when a command asked; nothing was changed.",
                 "Run the command again to decide otherwise."),
    "os": ("The system refused to read or write a file.", "Check the path, its permissions and the space on the disk."),
    # 3: set-up
    "config": ("A plan, site file or command asks for something that does not exist or does not fit.",
               "The message names the key; `fedlora new plan --all` and `fedlora new site` print all keys with comments."),
    "data": ("The training data cannot be used.",
             "The message names file and lines, never a value. `fedlora check PLAN --site site.toml` tries them again."),
    "held": ("Another process uses this directory.", "Stop it, or wait for its end: the message has its number."),
    "key-file": ("A key is missing, damaged, somebody else's, or readable by other users.",
                 "Restore it from a backup, or make a new one with `fedlora keygen` and have it enrolled again."),
    "local-port": ("A port of this machine is taken, often by a second site on it.",
                   "Set `local_port = 0` in the site file: any free one."),
    "model": ("A base model or an adapter on this disk cannot be used.", "The message says which check failed and the way out."),
    "not-installed": ("A package of an extra is not installed.", "Install the extra that the hint names."),
    "state-lost": ("This site's state of earlier rounds is gone, and going on would give another result.",
                   "Run `fedlora site repair site.toml`: it lists the choices."),
    "store": ("A record of a run is missing, damaged, or belongs to another run.",
              "The message names the file and its hint the way out. Where it says that a file is damaged, `fedlora site repair "
              "site.toml` or `fedlora server repair HOME` lists the choices."),
    # 4: connection and enrollment
    "connection": ("The other side does not answer.", "Check address, port, proxy and network; the message says what was tried."),
    "exposed": ("A port is open to the network that must not be: everybody could start runs there.",
                "Close it in the firewall; only the gateway's port may be reached from outside."),
    "revoked-site": ("This site was enrolled once; the roster does not list it any more.", "Talk to the coordinator."),
    "roster-expired": ("The roster is outside its time, or a clock is wrong.",
                       "Check this machine's clock. If it is right, the coordinators sign the next epoch."),
    "roster-invalid": ("The roster is not the one that was approved here, or too few coordinators have signed it.",
                       "Compare its digest by telephone, then correct `roster` in the site file: it is read again."),
    "roster-rollback": ("An older roster than the one in force here, or a second one of the same epoch.",
                        "Ask the coordinators which epoch is the last; do not delete what this site remembers."),
    "unknown-site": ("The sender is none of the enrolled sites.", "The coordinator enrolls its key, or corrects its name."),
    "wrong-secret": ("The file with the secret between two processes of this machine is another one's.",
                     "Stop all processes of this site or server, then start it again."),
    # 5: refused
    "audit": ("An adapter is not published: its plan asks for a leakage audit, which is missing or has found something.",
              "`fedlora audit run RUN` says what was found; the message has the way out. Train again before you publish."),
    "budget": ("One more release would exceed the privacy budget of this site, or a round was asked for too often.",
               "Fewer rounds or more noise in the plan; or the operator decides on a larger privacy.budget_epsilon."),
    "impossible-adapter": ("The published adapter moved further than the sums of its rounds can move it.",
                           "The site takes no further part. The coordinator keeps all files and finds out who wrote it."),
    "plan-not-approved": ("No person at this site has approved this plan.",
                          "Read what it asks for: `fedlora site approve plan.toml --site site.toml`."),
    "plan-refused": ("This site does not do what the plan asks for, for another reason than one key of its policy.",
                     "The site's own log says which part; talk to it."),
    "run-not-approved": ("This site has approved the plan for fewer runs.",
                         "Approve one more run: `fedlora site approve` says what it could show beside the earlier ones."),
    "sits-out": ("This site's operator has taken it out of this run, or out of the federation (`fedlora site leave`).",
                 "Out of a run: nothing, it takes part in the next one. If it has left: it comes back with a new line, by "
                 "`fedlora site join`, which makes new keys."),
    "version-unsupported": ("The two ends have versions of FedLoRA that do not fit.", "Install the same version at both ends."),
    "wrong-base": ("This site's copy of the base model is not the one that the plan is pinned to.",
                   "Copy the directory again from the source that the coordinator names, all files of it."),
    # 6, 7
    "quorum": ("Too few sites delivered before the deadline.",
               "The run's record says who was missing and why. Then start with --resume; no finished round is lost."),
    "resources": ("Memory or disk is full.",
                  "Take a smaller batch or max_length, or free space: `fedlora check` forecasts memory."),
    # the run
    "error": ("Something failed that has no code of its own.", f"At the other end, {_UNKNOWN_CAUSE}."),
    "internal": ("A bug of FedLoRA at the other end.", f"There, {_UNKNOWN_CAUSE}."),
    "remote": ("A site answered with an error instead of an update.", f"At that site, {_UNKNOWN_CAUSE}."),
    "run-failed": ("The run cannot go on.", "The message says why; finished rounds are kept, and --resume goes on after them."),
    "stopped": ("The run, or its server, was stopped in order.", "Start it again with --resume."),
    # bytes
    "bad-signature": ("Not signed by the key that is pinned for the sender.",
                      "Compare the fingerprints of both keys by telephone before anything else."),
    "cannot-open": ("Could not be decrypted.", "Check that both ends hold each other's present public key."),
    "envelope": _TAMPERED,
    "equivocation": ("The server tells sites different things.", "The sites keep their files and talk to each other."),
    "malformed-header": _TAMPERED,
    "oversized": ("More bytes than are due; they were refused before they were stored.",
                  "That site checks that its copy of FedLoRA and its plan are intact."),
    "payload-mismatch": _TAMPERED,
    "replayed": ("A message that came before.", "Nothing, if it happens once. Again: two processes use one identity."),
    "suite-downgrade": ("Weaker cryptography is asked for than was agreed.", "Install the same version of FedLoRA at both ends."),
    "trailing-bytes": _TAMPERED,
    "truncated": _TAMPERED,
    "wire": ("Bytes that are not what FORMAT.md describes.", "Install the same version of FedLoRA at both ends."),
    "wrong-context": _OTHER,
    "wrong-direction": _OTHER,
    "wrong-federation": _OTHER,
    "wrong-global": ("Made from another adapter than the one that this round began with.",
                     "Nothing, if it happens once: the site takes part in the next round."),
    "wrong-layout": ("The adapter's tensors are not those of the plan.", "Both ends compare plan and base model."),
    "wrong-plan": ("Made for another plan.", "The coordinator compares the plan's digest with the site's."),
    "wrong-recipient": _OTHER,
    "wrong-round": _OTHER,
    "wrong-run": _OTHER,
    # updates
    "non-finite": ("An update holds NaN or infinity.", "Training diverged there: lower the learning rate, look at the data."),
    "update-rejected": ("An update must not be aggregated.", "The server's screen says why."),
    "weight-too-large": ("A site claims more weight than the plan allows.", "Compare its data with aggregate.max_weight."),
    # secure aggregation
    "bad-dealer": ("A site's own signature proves that it dealt false shares.",
                   "It is out of this run: ask whether its copy is intact."),
    "bad-share": ("A share is not what its dealer has committed to.", "The dealer is named in the run's record."),
    "both-secrets": ("Somebody asked for both kinds of a site's shares, which would open its update.",
                     "The session is burnt and nothing was opened. Keep the server's files: this is an attack or a bug."),
    "cohort-too-small": ("So few sites are left that the sum would show too much of one.", "Wait until more sites are there."),
    "complaint-unanswered": ("A site did not show what it had dealt.", "It is left out; the round is tried again."),
    "dropped-out": ("A site gave no update to a session that could not end without it.",
                    "The round is tried again. Ask the site what stops it in the middle of a round."),
    "lone-change": ("This sum, alone or beside earlier ones, could show one site's update.",
                    "`fedlora check` says what a plan of so many sites survives; a person may approve it with --uncovers."),
    "secrets-gone": ("The secrets of this session are not there any more, often after a restart.",
                     "Nothing: the next session goes on."),
    "session": ("A message of secure aggregation does not fit the session.", "Nothing, if it happens once."),
    "session-spent": ("This site has given its masked update of this round already.", "Nothing: the next round goes on."),
    "votes-missing": ("Too few sites agreed on who is in the sum.", "The round is tried again; look who was away."),
    # of a round's record: why a site is not in it
    "late": ("The site did not answer before the deadline.", "Give the round more time (round_deadline), or ask what keeps it."),
    "offline": ("The site was not connected when the round began.", "Its operator runs `fedlora site up site.toml`."),
    "not-drawn": ("The plan asks only some sites in each round; this one was not drawn.", "Nothing."),
    "flower": ("The relay reported a failure of its own.", "Look at the screen of `fedlora server up`."),
    "site-process": ("The site's process ended while it worked, or does not know what was asked.",
                     "At the site: start `fedlora site up` again; it says what ended it."),
    "site-stopped": ("The site was stopped by its operator while it worked.", "It answers when it is started again."),
    "message-unavailable": ("The request was lost on the way.", "Nothing: the site is asked again in the next round."),
    "reply-unavailable": ("The answer was lost on the way.", "Nothing: the site is asked again in the next round."),
    "node-unavailable": ("The site's connection ended before its answer, and it did not come back in time.",
                         "Ask its operator what happened to machine and line."),
    "bundle-refused": ("The site refused the run's bundle: it is not the one that its FedLoRA knows.",
                       "Install the same version of FedLoRA at both ends."),
    **{code: (f"This site's {policy_key(code)} does not allow what the plan asks for.",
              f"Change {policy_key(code)} in the site file, or {key} in the plan; the site's own log has the values.")
       for code, key in REFUSES.items()},
}  # fmt: skip
"""A code: what it means, and what to do."""


def meanings() -> dict[str, tuple[str, str]]:
    """:data:`MEANINGS`, and what `fedlora site doctor` and `fedlora site up` find, by the tables that they use."""
    from fedlora.doctor.findings import FAULTS  # in here: --help loads nothing heavy
    from fedlora.processes.causes import CAUSES

    found = {name: cause.explained() for name, cause in CAUSES.items()} | dict(FAULTS)
    return {name: (_sentence(meaning), _sentence(cure)) for name, (meaning, cure) in found.items()} | MEANINGS


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}{'' if text.endswith('.') else '.'}"


_SHOWN: Final = 3


def _code_in(text: str, known: Collection[str]) -> str:
    """The code that a text is, or that an error's whole text names; empty: none.

    In an error's text it stands in brackets; elsewhere a word counts that is a code and no ordinary word.
    """
    if (word := text.strip().strip("()`'\".:").lower().replace("_", "-")) in known:
        return word
    bracketed = re.findall(r"(?:error|finding)?\s*\(([a-z0-9-]+)\)", text)
    words = [word for word in re.findall(r"[a-z0-9]+(?:-[a-z0-9]+)+", text)]
    return next((word for word in [*bracketed, *words] if word in known), "")


def _unknown(text: str, known: Collection[str]) -> ConfigError:
    """Says which codes are spelled like this, or else share a word with it."""
    from difflib import get_close_matches

    from fedlora.core.errors import ConfigError

    word = text.strip().lower().replace("_", "-")
    parts = {part for part in word.split("-") if len(part) > 3}
    shared = {c: len(parts & {*c.split("-")}) for c in sorted(known)}
    near = get_close_matches(word, known, 1, 0.85) or get_close_matches(word, known, _SHOWN)
    near = near or sorted((c for c, count in shared.items() if count), key=lambda c: -shared[c])[:_SHOWN]
    hint = f"did you mean {' or '.join(near)}?" if near else "`fedlora explain` lists all"
    return ConfigError(f"there is no code {text[:80]!r}", hint=hint)


def explain(
    code: Annotated[
        list[str] | None,
        typer.Argument(help="A code or a finding, as `data`, or an error's text; default: list all.", show_default=False),
    ] = None,
    json: Json = False,
) -> None:
    """Say what a code of an error or the name of a finding means and what to do.

    Works without a network. Codes stand in brackets behind "error" and behind a finding, in a run's records and in JSON. Of a
    whole error, in quotation marks, the code is found.

    Example: fedlora explain wrong-base
    """
    from fedlora.answers import Explained
    from fedlora.core.codes import exit_status, is_code

    known, said = meanings(), " ".join(code or ())
    found = _code_in(said, known)
    if said and not found:
        raise _unknown(said, known)
    wanted = [found] if found else sorted(known)
    lines = [f"{name:22} {known[name][0]}" for name in wanted]
    if found:
        lines = [f"{found}:"] * (found != said) + [*known[found]]
        if is_code(found):
            lines.append(f"A command that ends with it has exit status {exit_status(found)}: {STATUSES[exit_status(found)]}.")
    listed = [Explained(code=name, meaning=known[name][0], cure=known[name][1]) for name in wanted]
    emit({"codes": listed}, lines, as_json=json)
