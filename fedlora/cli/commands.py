"""The commands. Each parses, calls the library and prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from fedlora.cli.approval import approve
from fedlora.cli.checking import PlanFile, check
from fedlora.cli.output import Json, Quiet, Screen, emit
from fedlora.cli.publishing import export, verify
from fedlora.cli.repair import server_repair, site_repair
from fedlora.cli.roster import roster
from fedlora.cli.schema import schema

app = typer.Typer(
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Federated LoRA fine-tuning: training data stays at each site, only encrypted adapter updates are sent.",
)
new = typer.Typer(no_args_is_help=True, help="Print a sample file with comments.")
keygen = typer.Typer(no_args_is_help=True, help="Create the keys of a site or of a server.")
server = typer.Typer(no_args_is_help=True, help="For the coordinator: run the aggregation server.")
site = typer.Typer(no_args_is_help=True, help="For a hospital or branch: take part in runs.")
app.add_typer(new, name="new")
app.add_typer(keygen, name="keygen")
app.add_typer(server, name="server")
app.add_typer(site, name="site")
app.add_typer(roster, name="roster")
app.command()(schema)
site.command("approve")(approve)


@app.command()
def version(json: Json = False) -> None:
    """Print the versions of FedLoRA and Flower.

    Example: fedlora version --json
    """
    from importlib.metadata import version as installed

    from fedlora.core.answers import Version

    found = Version(fedlora=installed("fedlora"), flwr=installed("flwr"))
    emit(found, f"fedlora {found['fedlora']} (flwr {found['flwr']})", as_json=json)


@new.command("plan")
def new_plan(json: Json = False) -> None:
    """Print a plan with every key, its default and a comment.

    Example: fedlora new plan > plan.toml
    """
    from fedlora.core.answers import Sample
    from fedlora.core.plan import Plan
    from fedlora.core.toml import sample

    text = sample(Plan).rstrip()
    emit(Sample(text=text), text, as_json=json)


@new.command("site")
def new_site(json: Json = False) -> None:
    """Print a site file with every key, its default and a comment.

    Example: fedlora new site > site.toml
    """
    from fedlora.core.answers import Sample
    from fedlora.core.toml import sample
    from fedlora.site.site_file import SiteFile

    text = sample(SiteFile).rstrip()
    emit(Sample(text=text), text, as_json=json)


@new.command("simulation")
def new_simulation(json: Json = False) -> None:
    """Print a plan for `fedlora simulate`.

    It needs no data and no download.

    Example: fedlora new simulation > toy.toml && fedlora simulate toy.toml
    """
    from fedlora.core.answers import Sample
    from fedlora.core.plan import Plan, Simulation
    from fedlora.core.toml import dump_toml

    text = dump_toml(Plan(simulation=Simulation())).rstrip()
    emit(Sample(text=text), text, as_json=json)


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
    from fedlora.core.answers import SiteKeys
    from fedlora.flower.enrol import make_site_keys

    public, fingerprint = make_site_keys(name, out)
    emit(
        SiteKeys(public=str(public), fingerprint=fingerprint),
        f"send to the coordinator: {public}\nfingerprint, to compare over the telephone: {fingerprint}",
        as_json=json,
    )


@keygen.command("server")
def keygen_server(
    home: Annotated[Path, typer.Argument(help="Directory of the server; created if it does not exist.")],
    host: Annotated[list[str], typer.Option(help="Host name or IP address that sites connect to; may be repeated.")],
    json: Json = False,
) -> None:
    """Create a server's directory.

    It holds the signing key, a certificate authority, the TLS certificate and secrets.

    Example: fedlora keygen server study --host fed.example.org
    """
    from fedlora.core.answers import ServerKeys
    from fedlora.flower.enrol import make_server_home

    fingerprint = make_server_home(home, hosts=host)
    emit(
        ServerKeys(home=str(home), fingerprint=fingerprint),
        f"send to every site: {home / 'server.pub'} and {home / 'tls' / 'ca.crt'}\n"
        f"put each site's .pub file into: {home / 'sites'}\nfingerprint, to compare over the telephone: {fingerprint}",
        as_json=json,
    )


# --- plans --------------------------------------------------------------------------------------------------


app.command()(check)


@app.command()
def pin(
    plan: PlanFile,
    model: Annotated[Path, typer.Option(help="Base model: a Hugging Face directory or a GGUF file.")],
    out: Annotated[Path, typer.Option(help="Directory to create, for the pinned plan and the first adapter.")],
    json: Json = False,
) -> None:
    """Prove a base model, pin a plan to it and create the first adapter.

    The pinned plan holds a digest of each; a site refuses a task for any other base model or first adapter. What was found out
    about the base is printed and kept beside the plan.

    Example: fedlora pin plan.toml --model models/SmolLM2 --out study/plan
    """
    from fedlora.core.answers import Pinned
    from fedlora.core.words import proof_lines
    from fedlora.flower.enrol import pin_plan

    pinned, proof = pin_plan(plan, model, out)
    facts = Pinned(plan=pinned.digest(), base=pinned.model.digest, init=pinned.lora.init_digest, proof=proof)
    text = f"{out / 'plan.toml'}: plan {facts['plan'][:12]}, base {facts['base'][:12]}"
    emit(facts, "\n".join([text, *proof_lines(proof)]), as_json=json)


@app.command()
def simulate(
    plan: PlanFile,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Directory of the results; default: runs/NAME, where NAME is run.name of the plan.", show_default=False
        ),
    ] = None,
    seeds: Annotated[str, typer.Option(help="Seeds, separated by commas; default: run.seed of the plan.")] = "",
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted simulation.")] = False,
    transport: Annotated[
        Literal["local", "flower"],
        typer.Option(help="local: everything in this process; flower: real Flower processes on this machine."),
    ] = "local",
    drop: Annotated[
        list[str] | None,
        typer.Option(
            help="Let a site drop out: SITE@STEP[:ROUND], may be repeated. STEP is train or, under secure aggregation, also "
            "share, mask, vote or unmask. Without ROUND: in every round.",
            show_default=False,
        ),
    ] = None,
    batch_sites: Annotated[
        bool,
        typer.Option(
            "--batch-sites",
            help="Train all sites together, with one pass over the base model for each step. Faster for many small sites on a "
            "GPU; results differ by rounding only.",
        ),
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Simulate a federation and its baselines on this machine.

    The baselines are compared at equal numbers of training tokens.

    Example: fedlora simulate simulations/plans/toy.toml --seeds 0,1,2
    """
    from fedlora.core.answers import Simulated
    from fedlora.formats.plans import load_plan
    from fedlora.lab.simulate import parse_seeds
    from fedlora.lab.simulate import simulate as run

    found = load_plan(plan)
    where = out or Path("runs") / found.run.name
    with Screen(quiet=quiet, as_json=json) as screen:
        results = run(
            found,
            root=plan.resolve().parent,
            out=where,
            seeds=parse_seeds(seeds, default=found.run.seed),
            resume=resume,
            transport=transport,
            drop=drop or [],
            batch_sites=batch_sites,
            report=screen,
        )
    emit(Simulated(out=str(where), results=results), _summary(where), as_json=json)


def _summary(where: Path) -> str:
    page = where / "report.html"
    later = f"\nno report.html: pip install 'fedlora[report]', then fedlora report {where}"
    return (where / "summary.txt").read_text() + (f"\nreport: {page}" if page.exists() else later)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Directory of a simulation, or of one of its seeds.")],
    figures: Annotated[
        Path | None, typer.Option(help="Also write each figure to this directory, as PDF and PNG for papers.", show_default=False)
    ] = None,
    json: Json = False,
) -> None:
    """Write report.html from the results of a simulation.

    Example: fedlora report runs/clinical --figures figures
    """
    from fedlora.core.answers import Reported
    from fedlora.lab.report import load, write_figures, write_html

    results, page = load(run), run / "report.html"
    write_html(results, page)
    files = write_figures(results, figures) if figures is not None else []
    text = f"report: {page}" + f"\nfigures: {len(files)} files in {figures}" * bool(files)
    emit(Reported(report=str(page), figures=[str(f) for f in files]), text, as_json=json)


app.command()(export)
app.command()(verify)


@app.command()
def inspect(file: Annotated[Path, typer.Argument(help="Any file that FedLoRA has written.")], json: Json = False) -> None:
    """Describe a file: names and sizes, never values.

    Example: fedlora inspect runs/clinical/seed-0/adapter.safetensors
    """
    from fedlora.library.publish import describe

    found = describe(file)
    lines = [f"kind: {found['kind']}", *(f"{k}: {v}" for k, v in found["facts"].items())]
    emit(found, "\n".join(lines), as_json=json)


# --- deployment -----------------------------------------------------------------------------------------------


@server.command("up")
def server_up(
    home: Annotated[Path, typer.Argument(help="The server's directory, from `fedlora keygen server`.")],
    listen: Annotated[
        str, typer.Option(help="Address and port on which sites are accepted; 0.0.0.0: all IPv4 addresses of this machine.")
    ] = "0.0.0.0:8443",
    max_body: Annotated[int, typer.Option(help="Largest request body that is accepted, bytes; the default is 64 MiB.")] = 64
    << 20,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Start the server and keep it running.

    It consists of a relay on the loopback interface and a gateway that accepts the sites over TLS.

    Example: fedlora server up study --listen 0.0.0.0:8443
    """
    from fedlora.core.answers import ServerUp
    from fedlora.flower.server import up

    with Screen(quiet=quiet, as_json=json) as screen:
        up(home, listen=listen, body_limit_bytes=max_body, report=screen)
    emit(ServerUp(home=str(home)), "", as_json=json)


@server.command("start")
def server_start(
    home: Annotated[Path, typer.Argument(help="The server's directory, on which `fedlora server up` is running.")],
    plan: PlanFile,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run of this plan that was stopped.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Start a run and follow it to its end.

    Interrupting this command does not stop the run.

    Example: fedlora server start study study/plan/plan.toml
    """
    from fedlora.flower.server import start
    from fedlora.library.publish import outcome

    with Screen(quiet=quiet, as_json=json) as screen:
        directory = start(home, plan, resume=resume, report=screen)
    emit(*outcome(directory), as_json=json)


@site.command("up")
def site_up(
    file: Annotated[Path, typer.Argument(help="Site file (TOML).")],
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Connect to the server and take part in runs until stopped.

    Only outbound connections are made.

    Example: fedlora site up site.toml
    """
    from fedlora.core.answers import SiteUp
    from fedlora.flower.site import up

    with Screen(quiet=quiet, as_json=json) as screen:
        up(file, report=screen)
    emit(SiteUp(file=str(file)), "", as_json=json)


server.command("repair")(server_repair)
site.command("repair")(site_repair)
