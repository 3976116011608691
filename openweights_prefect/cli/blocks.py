"""`ow blocks`: the credentials and stores of a workspace, as Prefect block documents."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import click

from openweights_prefect.cli.output import json_option, print_json, print_table
from openweights_prefect.cli.session import user_environment
from openweights_prefect.stack.environment import QUIET_PREFECT
from openweights_prefect.stack.services import module_command


@click.group()
def blocks() -> None:
    """Save credentials as Prefect block documents.

    \b
    Example:
      ow blocks ls
    """


@blocks.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--document", metavar="NAME", help="Name of the block documents; `openweights` otherwise.")
@json_option
def apply(names: tuple[str, ...], document: str | None, as_json: bool) -> None:
    """Save block documents from environment variables.

    Without a name, every block whose variables are set. What is there is overwritten. `ow blocks ls` lists
    the names.

    \b
    Example:
      RUNPOD_API_KEY=rpa_... ow blocks apply runpod_credentials
    """
    options = () if document is None else ("--document", document)
    done = _child(*options, "apply", "--", *names)
    if as_json:
        print_json(done)
        return
    for block in done["applied"]:
        click.echo(f"Saved {block['type']}/{block['document']}")
    for block in done["skipped"]:
        click.echo(f"Skipped {block['block']}: {', '.join(block['missing'])} not set", err=True)


@blocks.command()
@json_option
def ls(as_json: bool) -> None:
    """List the blocks, the variables that they lack, and the documents in Prefect.

    \b
    Example:
      ow blocks ls --json
    """
    done = _child("ls")
    if as_json:
        print_json(done)
        return
    columns = ("name", "block type", "not set", "documents")
    print_table(columns, [_row(block) for block in done["blocks"]])


def _child(*arguments: str) -> Any:
    """What the child prints; its environment keeps Prefect from reporting to anybody."""
    result = subprocess.run(
        module_command("openweights_prefect.cli.blocks_child", *arguments),
        env={**user_environment(), **QUIET_PREFECT},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    if result.returncode != 0:
        raise click.ClickException(result.stderr.strip())
    return json.loads(result.stdout)


def _row(block: dict[str, Any]) -> tuple[object, ...]:
    return block["block"], block["type"], ", ".join(block["missing"]), ", ".join(block["documents"])
