"""The commands. Each parses, calls the library and prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedlora.cli import coordinator
from fedlora.cli.approval import approve
from fedlora.cli.checking import PlanFile, check
from fedlora.cli.doctor import doctor
from fedlora.cli.explain import STATUSES, explain
from fedlora.cli.guides import docs
from fedlora.cli.keeping import enrolling
from fedlora.cli.keeping.audit import audit
from fedlora.cli.keeping.backup import backup, restore
from fedlora.cli.keeping.budget import budget
from fedlora.cli.keeping.leakage import leakage
from fedlora.cli.keeping.personalizing import personalize
from fedlora.cli.keeping.repair import server_repair, site_repair
from fedlora.cli.keeping.scoring import evaluate
from fedlora.cli.leaving import dry_run, outbox
from fedlora.cli.output import Json, Quiet, Screen, emit
from fedlora.cli.publishing import export, verify
from fedlora.cli.result import pull, try_adapter
from fedlora.cli.roster import roster
from fedlora.cli.rules import compare_rules
from fedlora.cli.schema import schema
from fedlora.cli.service import install_service, leave, pause, resume
from fedlora.cli.simulating import compare, simulate
from fedlora.cli.standing import status, watch
from fedlora.cli.tracking import Tracker, following

app = typer.Typer(
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Federated LoRA fine-tuning: training data stays at each site, only encrypted adapter updates are sent.",
    epilog="Exit status: " + "; ".join(f"{status} {meaning}" for status, meaning in STATUSES.items()),
)
new = typer.Typer(no_args_is_help=True, help="Print a sample file with comments.")
keygen = typer.Typer(no_args_is_help=True, help="Create keys without an invitation.")
server = typer.Typer(no_args_is_help=True, help="Run the aggregation server, and runs on it.")
site = typer.Typer(no_args_is_help=True, help="Take part in runs.")
app.add_typer(new, name="new")
app.add_typer(keygen, name="keygen")
app.add_typer(server, name="server")
app.add_typer(site, name="site")
app.add_typer(roster, name="roster")
app.add_typer(budget, name="budget")
app.add_typer(leakage, name="audit")
app.command()(schema)
app.command()(explain)
app.command()(docs)
site.command("approve")(approve)
for _command in (doctor, status, watch, outbox, dry_run, pause, resume, leave, install_service, pull):
    site.command()(_command)


def _version(asked: bool) -> None:
    if asked:
        version()
        raise typer.Exit


@app.callback()
def _all(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the versions.")] = False,
) -> None:
    pass


@app.command()
def version(json: Json = False) -> None:
    """Print the versions of FedLoRA and Flower.

    Example: fedlora version --json
    """
    from importlib.metadata import version as installed

    from fedlora.answers import Version

    found = Version(fedlora=installed("fedlora"), flwr=installed("flwr"))
    emit(found, [f"fedlora {found['fedlora']} (flwr {found['flwr']})"], as_json=json)


@new.command("plan")
def new_plan(
    everything: Annotated[bool, typer.Option("--all", help="All keys, also those that few plans change.")] = False,
    json: Json = False,
) -> None:
    """Print a plan with the keys that most plans set, their defaults and comments.

    Example: fedlora new plan > plan.toml
    """
    from fedlora.answers import Sample
    from fedlora.core.plan import FIRST_KEYS, Plan
    from fedlora.core.toml import sample, short_sample

    note = "The keys that most plans set; `fedlora new plan --all` prints all."
    text = (sample(Plan) if everything else short_sample(Plan, FIRST_KEYS, note)).rstrip()
    emit(Sample(text=text), text.split("\n"), as_json=json)


@new.command("site")
def new_site(json: Json = False) -> None:
    """Print a site file with every key, its default and a comment.

    Example: fedlora new site > site.toml
    """
    from fedlora.answers import Sample
    from fedlora.core.toml import sample
    from fedlora.site.site_file import SiteFile

    text = sample(SiteFile).rstrip()
    emit(Sample(text=text), text.split("\n"), as_json=json)


@new.command("simulation")
def new_simulation(json: Json = False) -> None:
    """Print a plan for `fedlora simulate`.

    It needs no data and no download.

    Example: fedlora new simulation > toy.toml && fedlora simulate toy.toml
    """
    from fedlora.answers import Sample
    from fedlora.core.plan import Plan, Training
    from fedlora.core.tables.simulation import Simulation
    from fedlora.core.toml import dump_toml

    text = dump_toml(Plan(simulation=Simulation(), training=Training(max_length=256))).rstrip()  # of the toy's 512 positions
    emit(Sample(text=text), text.split("\n"), as_json=json)


# --- keys ---------------------------------------------------------------------------------------------------


@keygen.command("site")
def keygen_site(
    name: Annotated[str, typer.Argument(help="Name of the site: a-z, 0-9 and -.")],
    out: Annotated[Path, typer.Option(help="Directory to write the keys to.")] = Path("keys"),
    json: Json = False,
) -> None:
    """Create a site's keys.

    Send NAME.pub to the coordinator. The .key files are secret and stay at the site.

    Example: fedlora keygen site st-marys --out keys
    """
    from fedlora.answers import SiteKeys
    from fedlora.flower.enrol import make_site_keys

    public, fingerprint = make_site_keys(name, out)
    emit(
        SiteKeys(public=str(public), fingerprint=fingerprint),
        [
            f"public part, to give away: {public}",
            f"fingerprint, to compare over the telephone: {fingerprint}",
            "a site sends it to the coordinator; a coordinator's own goes into `fedlora roster new --coordinator`",
        ],
        as_json=json,
    )


# --- plans --------------------------------------------------------------------------------------------------


app.command()(check)


@app.command()
def pin(
    plan: PlanFile,
    model: Annotated[Path, typer.Option(help="Base model: a Hugging Face directory or a GGUF file.")],
    out: Annotated[Path, typer.Option(help="Directory to create, for the pinned plan and the first adapter.")],
    init: Annotated[
        Path | None,
        typer.Option(help="Begin with an earlier run's adapter: its directory, file, or PEFT export.", show_default=False),
    ] = None,
    json: Json = False,
) -> None:
    """Prove a base model, pin a plan to it and create the first adapter.

    The pinned plan holds a digest of each; a site refuses a task for any other base model or first adapter. What was found out
    about the base is printed and kept beside the plan. Of a plan with [privacy] it finds the noise for its epsilon. With --init
    the run begins where an earlier one ended; sites then need the whole directory.

    Example: fedlora pin plan.toml --model models/SmolLM2 --out study/plan
    """
    from fedlora.answers import Pinned
    from fedlora.core.deployment.digests import grouped
    from fedlora.core.words import proof_lines
    from fedlora.flower.enrol import pin_plan
    from fedlora.formats.plans import FIRST, load_plan
    from fedlora.library.leakage import audit_lines
    from fedlora.privacy.claims import claim_lines, claim_of

    pinned, proof = pin_plan(plan, model, out, init=init)
    claim = claim_of(pinned)
    facts = Pinned(plan=pinned.digest(), base=pinned.model.digest, init=pinned.lora.init_digest, proof=proof, privacy=claim)
    text = f"plan {facts['plan'][:12]}, base {facts['base'][:12]}: {out / 'plan.toml'}"
    aloud = f"plan digest, to compare over the telephone: {grouped(facts['plan'])}"
    if pinned.lora.init and load_plan(plan).simulation is not None:
        text += f"\nto simulate it: lora.init = '{pinned.lora.init}' in {plan}, and a copy of {out / FIRST} beside that file"
    emit(facts, [*text.split("\n"), aloud, *claim_lines(claim), *audit_lines(pinned), *proof_lines(proof)], as_json=json)


app.command()(simulate)
app.command()(compare)
app.command("compare-rules")(compare_rules)


@app.command()
def report(
    run: Annotated[
        Path,
        typer.Argument(
            help="Directory of a simulation, or of one of its seeds; or of a server's run, HOME/runs/NAME; or a site file."
        ),
    ],
    figures: Annotated[
        Path | None, typer.Option(help="Also write each figure to this directory, as PDF and PNG for papers.", show_default=False)
    ] = None,
    json: Json = False,
) -> None:
    """Write report.html from the results of a simulation, the records of a server's run, or what a site keeps of its own rounds.

    Of a site file site.toml the page is site-report.html beside it, for this user alone.

    Example: fedlora report study/runs/my-run
    """
    from fedlora.answers import Reported
    from fedlora.lab.page import deployment
    from fedlora.lab.report import load, write_figures, write_html

    page = run / "report.html"
    if run.suffix == ".toml":
        from fedlora.lab.site.report import write_page

        page = run.with_name(f"{run.stem}-report.html")
        files = write_page(run, page, figures=figures)
    elif deployment.holds(run):
        files = deployment.write_page(run, page, figures=figures)
    else:
        results = load(run)
        write_html(results, page)
        files = write_figures(results, figures) if figures is not None else []
    lines = [f"report: {page}", *([f"figures: {len(files)} files in {figures}"] if files else [])]
    emit(Reported(report=str(page), figures=[str(f) for f in files]), lines, as_json=json)


app.command()(export)
app.command()(verify)
app.command("try")(try_adapter)
app.command("evaluate")(evaluate)
app.command()(personalize)


@app.command()
def inspect(file: Annotated[Path, typer.Argument(help="Any file that FedLoRA has written.")], json: Json = False) -> None:
    """Describe a file: names and sizes, never values.

    Example: fedlora inspect runs/clinical/seed-0/adapter.safetensors
    """
    from fedlora.library.publish import describe

    found = describe(file)
    emit(found, [f"kind: {found['kind']}", *(f"  {k}: {v}" for k, v in found["facts"].items())], as_json=json)


# --- deployment -----------------------------------------------------------------------------------------------


@server.command("up")
def server_up(
    home: Annotated[Path, typer.Argument(help="The server's directory, from `fedlora server init`.")],
    listen: Annotated[
        str, typer.Option(help="Address and port on which sites are accepted; 0.0.0.0: all IPv4 addresses of this machine.")
    ] = "0.0.0.0:8443",
    max_body: Annotated[int, typer.Option(help="Largest request body that is accepted, bytes; the default is 64 MiB.")] = 64
    << 20,
    page: coordinator.Page = False,
    monitor: coordinator.Monitor = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Start the server and keep it running.

    It consists of a relay on the loopback interface and a gateway that accepts the sites over TLS.

    Example: fedlora server up study --listen 0.0.0.0:8443
    """
    from fedlora.answers import ServerUp
    from fedlora.flower.server import up

    with Screen(quiet=quiet, as_json=json) as screen:
        up(home, listen=listen, body_limit_bytes=max_body, report=screen, page=page, monitor=monitor)
    emit(ServerUp(home=str(home)), [], as_json=json)


@server.command("start")
def server_start(
    home: Annotated[Path, typer.Argument(help="The server's directory, on which `fedlora server up` is running.")],
    plan: PlanFile,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run of this plan that was stopped.")] = False,
    tracker: Tracker = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Start a run and follow it to its end.

    Interrupting this command does not stop the run.

    Example: fedlora server start study study/plan/plan.toml
    """
    from fedlora.flower.coordinator.follow import start
    from fedlora.formats.plans import load_plan
    from fedlora.library.publish import outcome

    name = load_plan(plan).run.name
    with Screen(quiet=quiet, as_json=json) as screen, following(tracker, home, name, screen) as report:
        directory = start(home, plan, resume=resume, report=report)
    emit(*outcome(directory), as_json=json)


@site.command("up")
def site_up(
    file: Annotated[Path, typer.Argument(help="Site file (TOML).")],
    monitor: coordinator.Monitor = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Connect to the server and take part in runs until stopped.

    Only outbound connections are made; what monitoring asks is answered on this machine alone.

    Example: fedlora site up site.toml
    """
    from fedlora.answers import SiteUp
    from fedlora.flower.site import up

    with Screen(quiet=quiet, as_json=json) as screen:
        up(file, report=screen, monitor=monitor)
    emit(SiteUp(file=str(file)), [], as_json=json)


enrolling.hook(server, site)
coordinator.hook(server)
server.command("repair")(server_repair)
server.add_typer(audit, name="audit")
server.command("backup")(backup)
server.command("restore")(restore)
site.command("repair")(site_repair)
