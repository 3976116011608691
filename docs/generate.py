"""Writes the reference pages of this folder from the code: `python docs/generate.py`."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

import openweights_prefect
from openweights_prefect.cli.main import main
from openweights_prefect.client import OpenWeights
from openweights_prefect.jobs.memory import MemoryEstimate
from openweights_prefect.jobs.options import Options
from openweights_prefect.jobs.request import JOB_TYPES
from openweights_prefect.resources.check_report import CheckReport, DataReport
from openweights_prefect.resources.jobs import StoredJobs
from openweights_prefect.resources.runs import Run
from openweights_prefect.settings import Settings

HERE = Path(__file__).resolve().parent
_HEAD = "<!-- Made by docs/generate.py; do not edit. -->\n"


def pages() -> dict[str, str]:
    """Every reference page: file name -> text."""
    return {
        "settings.md": "\n".join([_HEAD, *_settings()]),
        "cli.md": "\n".join([_HEAD, *_cli()]),
        "sdk.md": "\n".join([_HEAD, *_sdk()]),
    }


# Settings -----------------------------------------------------------------------------------------


def _settings() -> Iterator[str]:
    yield "# Settings\n"
    yield (
        "An environment variable counts before `$OW_HOME/credentials.json`, which `ow login` writes, that "
        "before `$OW_HOME/stack.json`, which `ow up` writes, and that before the default. Where one of the "
        "first two names a Supabase project, the addresses of the local stack do not count; where the "
        "environment names another ledger, the login does not: its token is shown to its own project only. "
        "`ow whoami` and `ow doctor` say which is in force.\n"
    )
    rows = []
    for field in dataclasses.fields(Settings):
        secret = " A secret: never shown." if field.metadata["secret"] else ""
        default = "" if field.default == "" else f"`{field.default}`"
        rows.append((f"`{field.metadata['variable']}`", default, field.metadata["description"] + secret))
    yield from _table(("variable", "default", "meaning"), rows)


# Commands -----------------------------------------------------------------------------------------


def _cli() -> Iterator[str]:
    yield "# The command `ow`\n"
    yield from _help(main)
    for path, command in commands():
        yield f"## `{path}`\n"
        yield f"```\n{_usage(path, command)}\n```\n"
        yield from _help(command)
        options = [_option(option) for option in command.params if isinstance(option, click.Option)]
        if options:
            yield from _table(("option", "meaning"), options)


def commands(command: click.Command = main, path: str = "ow") -> Iterator[tuple[str, click.Command]]:
    """Every command that does something, with its full name."""
    if not isinstance(command, click.Group):
        yield path, command
        return
    if command.invoke_without_command:
        yield path, command
    ctx = click.Context(command)
    for name in command.list_commands(ctx):
        child = command.get_command(ctx, name)
        assert child is not None
        yield from commands(child, f"{path} {name}")


def _usage(path: str, command: click.Command) -> str:
    arguments = [
        argument.metavar or (argument.name or "").upper()
        for argument in command.params
        if isinstance(argument, click.Argument)
    ]
    return " ".join([path, "[OPTIONS]", *arguments])


def _help(command: click.Command) -> Iterator[str]:
    """The help text; a paragraph that click keeps as it is becomes a code block."""
    for paragraph in inspect.cleandoc(command.help or "").split("\n\n"):
        if paragraph.startswith("\b\n"):
            lines = paragraph.removeprefix("\b\n").removeprefix("Example:\n")
            yield f"```bash\n{inspect.cleandoc(lines)}\n```\n"
        else:
            yield " ".join(paragraph.split()) + "\n"


def _option(option: click.Option) -> tuple[str, str]:
    names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
    if isinstance(option.type, click.Choice):
        names += " " + " or ".join(f"`{choice}`" for choice in option.type.choices)
    elif not option.is_flag:
        names += f" {option.metavar or 'VALUE'}"
    default = f" Default: {option.default}." if option.show_default else ""
    return names, (option.help or "") + default


# SDK ----------------------------------------------------------------------------------------------


def _sdk() -> Iterator[str]:
    yield "# The SDK\n"
    yield "`from openweights_prefect import " + ", ".join(sorted(openweights_prefect.__all__)) + "`\n"
    yield from _class("OpenWeights", OpenWeights)
    for name, kind in resources().items():
        yield from _class(f"ow.{name}", kind)
    for kind in JOB_TYPES.values():
        yield f"## Parameters of `ow.{kind.name}.create`\n"
        yield from _fields(kind.params)
    yield "## Options of every `create`\n"
    yield from _fields(Options)
    values: dict[str, type] = {"Job": openweights_prefect.Job, "Run": Run, "Jobs": openweights_prefect.Jobs}
    values |= {kind.__name__: kind for kind in (CheckReport, DataReport, MemoryEstimate)}
    for name, kind in values.items():
        yield from _class(name, kind)
    yield "## register\n"
    yield from _function("register", openweights_prefect.register)
    yield "## Errors\n"
    yield from _table(("error", "when"), _errors())


def resources() -> dict[str, type]:
    """What a client has: attribute -> class."""
    attributes = typing.get_type_hints(OpenWeights)
    run = typing.get_type_hints(inspect.getattr_static(OpenWeights, "run").fget)["return"]
    return {**attributes, "run": run}


def _class(title: str, kind: type) -> Iterator[str]:
    yield f"## {title}\n"
    yield _text(kind)
    if kind is OpenWeights:
        yield f"```python\n{title}({_parameters(kind)})\n```\n"
    if dataclasses.is_dataclass(kind):
        names = [field.name for field in dataclasses.fields(kind) if not field.name.startswith("_")]
        yield "Columns: " + ", ".join(f"`{name}`" for name in names) + ".\n"
    if issubclass(kind, StoredJobs) and kind is not StoredJobs:
        yield "Also has the methods of `ow.jobs`.\n"
    prefix = {"OpenWeights": "ow", "Job": "job", "Run": "run"}.get(title, title)
    for name, member in _members(kind):
        if isinstance(member, property):
            yield f"### {prefix}.{name}\n"
            yield _text(member)
        else:
            yield from _function(f"{prefix}.{name}", member, heading=True)


def _members(kind: type) -> Iterator[tuple[str, Any]]:
    """Public methods and properties of its own, in the order of the code."""
    for name, member in vars(kind).items():
        if not name.startswith("_") and (inspect.isfunction(member) or isinstance(member, property)):
            yield name, member


def _function(name: str, function: Callable[..., Any], *, heading: bool = False) -> Iterator[str]:
    if heading:
        yield f"### {name}\n"
    result = inspect.signature(function).return_annotation
    yield f"```python\n{name}({_parameters(function)}) -> {result}\n```\n"
    yield _text(function)


def _parameters(function: Callable[..., Any]) -> str:
    """The parameters as they are written in the code, without `self`."""
    texts: list[str] = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name == "self":
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not any(text.startswith("*") for text in texts):
            texts.append("*")
        stars = "**" if parameter.kind is parameter.VAR_KEYWORD else ""
        default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
        texts.append(f"{stars}{parameter.name}: {parameter.annotation}{default}")
    return ", ".join(texts)


def _fields(model: type[BaseModel]) -> Iterator[str]:
    rows = []
    for name, field in model.model_fields.items():
        default = "required" if field.default is PydanticUndefined else f"`{field.default!r}`"
        rows.append((f"`{name}`", default, field.description or ""))
    yield from _table(("name", "default", "meaning"), rows)


def _errors() -> list[tuple[str, str]]:
    public = [getattr(openweights_prefect, name) for name in openweights_prefect.__all__]
    errors = [kind for kind in public if isinstance(kind, type) and issubclass(kind, Exception)]
    return [(f"`{kind.__name__}`", _text(kind).strip()) for kind in errors]


def _text(thing: object) -> str:
    """The docstring, with paragraphs on one line; lists such as `Raises:` stay as they are."""
    paragraphs = []
    for paragraph in (inspect.getdoc(thing) or "").split("\n\n"):
        keep = "\n    " in paragraph
        paragraphs.append(f"```\n{paragraph}\n```" if keep else " ".join(paragraph.split()))
    return "\n\n".join(paragraphs) + "\n"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    lines = [columns, ["---"] * len(columns), *rows]
    cells = [" | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in line) for line in lines]
    yield "\n".join(f"| {line} |" for line in cells) + "\n"


if __name__ == "__main__":
    for name, text in pages().items():
        (HERE / name).write_text(text, encoding="utf-8")
