"""How commands take secrets and durations: never a secret in an argument, which other processes can read."""

from __future__ import annotations

import re
import sys
from datetime import timedelta

import click

from openweights_prefect.cli.session import user_environment

_UNITS = {"m": timedelta(minutes=1), "h": timedelta(hours=1), "d": timedelta(days=1), "w": timedelta(weeks=1)}


def read_secret(title: str, *, stdin: bool, variable: str = "", confirm: bool = False) -> str:
    """A secret from stdin, from the environment `variable`, or typed without echo, in this order."""
    if stdin:
        return _without_newline(sys.stdin.read())
    if variable and (value := user_environment().get(variable)):
        return value
    if not sys.stdin.isatty():
        choices = "write it to stdin (see --help)" + (f", or set {variable}" if variable else "")
        raise click.UsageError(f"There is no terminal to ask for the {title.lower()}: {choices}.")
    text: str = click.prompt(title, hide_input=True, confirmation_prompt=confirm, err=True)
    return text


def from_environment(variable: str) -> str:
    """The value of an environment variable of the user's."""
    value = user_environment().get(variable)
    if not value:
        raise click.UsageError(f"The environment variable {variable} is not set, or empty.")
    return value


class Duration(click.ParamType[timedelta | None]):
    """`30d`, `12h`, `90m`, `2w`; `never` is None."""

    name = "duration"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> timedelta | None:
        """Read the text; a default is read too."""
        text = str(value)
        if text == "never" or isinstance(value, timedelta):
            return value if isinstance(value, timedelta) else None
        match = re.fullmatch(r"(\d{1,6})([mhdw])", text)
        if match is None or int(match[1]) == 0:
            self.fail(f"{text!r} is not a duration like 90m, 12h, 30d or 2w, nor `never`.", param, ctx)
        return int(match[1]) * _UNITS[match[2]]


def _without_newline(text: str) -> str:
    """The last newline is the shell's; others may belong to the secret."""
    return text.removesuffix("\n").removesuffix("\r")
