"""The list of findings: what a site is looked at for, in order. One path for `site doctor`, `check --site` and `site up`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from fedlora.core.errors import FedLoRAError, NotInstalled
from fedlora.core.events import Event, Report
from fedlora.core.plan import Plan
from fedlora.core.sites.facts import SiteFinding
from fedlora.doctor import files, plans, rows
from fedlora.doctor.findings import Found, worst
from fedlora.doctor.gpus import gpus
from fedlora.gateway.clock import MAX_CORRECTION_S
from fedlora.gateway.entry.stage import asked_words, was_accepted
from fedlora.gateway.probe import enrolled, probe
from fedlora.site.pause import COMES_BACK, has_left
from fedlora.site.site_file import SiteFile, load_site_file

_AMISS_S = 5.0


def at_home(site_file: Path, *, plan: Plan | None = None) -> Iterator[Found]:
    """All that needs neither network nor training: keys, disk, approvals, bases, rows. As `site up` begins.

    Args:
        plan: the one that it is about; None: all that are approved.

    Raises:
        ConfigError: the site file is wrong.
    """
    file, root = load_site_file(site_file), site_file.resolve().parent
    keys = [*files.connection_keys(file, root), *files.identity_keys(file, root)]
    yield from keys
    yield from files.disk(file, root)
    yield from left(file, root)
    if worst(keys) is not None:
        return
    yield from gpus(file)
    yield from of_training(file, root, plan=plan)


def left(file: SiteFile, root: Path) -> Iterator[Found]:
    """Whether somebody here has said that this site leaves. A damaged note of that is said by `site repair`, and by `site up`."""
    with suppress(FedLoRAError):
        if has_left(root / file.state):
            said = f"{file.name} has left this federation: `fedlora site leave` was run here"
            yield Found("accepted", "has-left", "wrong", said, COMES_BACK, "sits-out")


def of_training(file: SiteFile, root: Path, *, plan: Plan | None) -> Iterator[Found]:
    """Approvals, roster, bases and rows: what a round would be made of."""
    about = [plan] if plan is not None else plans.known_plans(file, root)
    yield from plans.approved(file, root, named=plan)
    yield from plans.bases(file, root, about)
    yield from rows.data(file, root, seed=about[0].run.seed if about else 0)


def online(file: SiteFile, root: Path, *, timeout_s: float = 5.0) -> Iterator[Found]:
    """The way to the server, its certificate, the clocks, and whether it lets this site in."""
    ca = root / file.ca
    finding = probe(file.server, ca=ca, timeout_s=timeout_s)
    if finding.cause:
        yield Found.caused(finding.cause, finding.facts).lasting(sample="server" if file.is_sample("server") else "")
        return
    yield Found.right("server", f"{file.server} answers, and its certificate is of the authority in {ca}")
    ahead_s = finding.ahead_s or 0.0
    if abs(ahead_s) > MAX_CORRECTION_S:
        way = "ahead" if ahead_s > 0 else "behind"
        yield Found.caused("clock", {**finding.facts, "seconds": f"{abs(ahead_s):.0f}", "way": way})
        return
    corrected = "; what is signed is corrected, and NTP would mend it" if abs(ahead_s) > _AMISS_S else ""
    yield Found.right("clock", f"this machine's clock is {ahead_s:+.1f} s off the server's{corrected}", ahead_s=ahead_s)
    admitted = enrolled(file.server, ca=ca, node_key=root / file.node_key, ahead_s=ahead_s, timeout_s=timeout_s)
    if admitted.cause == "not-enrolled" and (words := asked_words(file, root)):
        yield Found.caused("awaits-approval", {**admitted.facts, "site": file.name, "words": " ".join(words)})
    elif admitted.cause == "not-enrolled" and was_accepted(file, root):
        yield Found.caused("withdrawn", admitted.facts)
    elif admitted.cause:
        yield Found.caused(admitted.cause, admitted.facts)
    else:
        yield Found.right("accepted", f"{file.server} knows this site's node key")


def examine(site_file: Path, *, plan: Plan | None, network: bool, step: bool, report: Report) -> Iterator[Found]:
    """Everything, as `site doctor` does.

    Args:
        plan: the one that it is about; None: those that are approved, the last one for the step.
        network: also look for the server.
        step: also do one training step, if there is a plan, and nothing speaks against it.

    Raises:
        ConfigError: the site file is wrong.
    """
    file, root = load_site_file(site_file), site_file.resolve().parent
    found = []
    for one in at_home(site_file, plan=plan):
        found.append(one)
        yield one
    yield from files.process(file, root)
    if network and not any(f.part in ("keys", "server") and f.status for f in found):  # "server": its authority's file
        yield from online(file, root)
    about = plan or next(iter(plans.known_plans(file, root)), None)
    if step and about is not None and worst(found) is None:
        yield training_step(site_file, about, report=report)


def training_step(site_file: Path, plan: Plan, *, report: Report) -> Found:
    """One real training step on this site's rows and device: what a round takes, in time and memory. Changes nothing."""
    try:
        from fedlora.learn.local import forecast

        _, here = forecast(site_file, plan, report=report)
    except ImportError as e:
        return Found.of("step", "no-training", NotInstalled(str(e.name), extra="train", what="training and `site up`"))
    except FedLoRAError as e:
        return Found.of("step", "step-failed", e)
    seconds, deadline_s = here["train_s"] + here["evaluate_s"], plan.federation.round_deadline
    said = (
        f"a step took {here['peak_bytes'] / 2**30:.2f} GiB on {here['device']}; a round of {here['steps']} steps takes "
        f"{here['train_s']:.0f} s, and {here['evaluate_s']:.0f} s for an evaluation"
    )
    if seconds > deadline_s:
        fix = "ask for a longer round_deadline or fewer local_steps in the plan"
        return Found("step", "too-slow", "note", f"{said}: longer than the plan's round_deadline of {deadline_s:.0f} s", fix)
    return Found.right("step", said, seconds=seconds, peak_bytes=here["peak_bytes"])


def settle(found: Iterable[Found], report: Report) -> None:
    """Tells what was found, and ends with the first finding that is wrong. What may go away by itself is somebody else's to tell.

    Raises:
        FedLoRAError: somebody has to act first; of the code of that finding.
    """
    kept = [f for f in found if f.verdict != "later"]
    for one in kept:
        report(Event.FINDING, SiteFinding(**one.facts()))
    if (wrong := worst(kept)) is not None:
        raise wrong.error()
