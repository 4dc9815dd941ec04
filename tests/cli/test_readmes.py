"""The commands that the READMEs show are commands: every word of them is one that `fedlora` takes."""

import re
import shlex
from pathlib import Path

import click
import pytest
import typer

from fedlora.cli.commands import app

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "server/README.md", "client/README.md", "simulations/README.md")


def shown():
    for page in PAGES:
        text = (ROOT / page).read_text("utf-8") if (ROOT / page).exists() else ""
        for block in re.findall(r"^```(?:console|sh|bash)?\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            for line in block.splitlines():
                for part in re.split(r"&&|[;>|]", line.removeprefix("$ ").split(" # ")[0]):
                    if part.strip().startswith("fedlora "):
                        yield page, part.strip()
        for word in re.findall(r"`(fedlora [a-z][^`\n]*)`", text):
            if re.search(r" [a-z/.-]+\.(toml|json) ", word + " "):  # a whole command in a sentence, not a name of one
                yield page, word


LINES = sorted(set(shown()))


def test_there_are_some():
    assert len(LINES) > 15


@pytest.mark.parametrize(("page", "line"), LINES, ids=lambda x: str(x))
def test_a_command_in_a_readme_is_one(page, line):
    command, words = typer.main.get_command(app), shlex.split(line)[1:]
    context = click.Context(command, info_name="fedlora")
    while isinstance(command, click.Group):
        assert words, "a group, not a command"
        name, found, words = command.resolve_command(context, words)
        assert found is not None
        context, command = click.Context(found, info_name=name, parent=context), found
    command.make_context(command.name, words, parent=context.parent)
