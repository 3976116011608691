"""How the commands print: JSON for programs, tables for people, tab-separated text for pipes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import click

_STYLES = {
    "completed": "green",
    "up": "green",
    "ok": "green",
    "in_progress": "cyan",
    "pending": "yellow",
    "canceled": "dim",
    "terminated": "dim",
    "lost": "red",
    "failed": "red",
    "fail": "red",
    "down": "red",
}

json_option: Callable[[Any], Any] = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def print_json(document: object) -> None:
    """Print one JSON document on a line of its own."""
    click.echo(json.dumps(document, default=_as_json, ensure_ascii=False, allow_nan=False))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table on a terminal, else tab-separated lines with a header."""
    texts = [["" if cell is None else str(cell) for cell in row] for row in rows]
    if not sys.stdout.isatty():
        for line in ([column.upper() for column in columns], *texts):
            click.echo("\t".join(" ".join(cell.split()) for cell in line))
        return
    from rich.console import Console  # Slow to import, and pipes do not need it.
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for line in texts:
        table.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in line))
    Console().print(table)


def print_fields(fields: Sequence[tuple[str, object]]) -> None:
    """Print names and values, one a line; what is None or empty is left out."""
    shown = [(name, value) for name, value in fields if value not in (None, "", [], {})]
    width = max((len(name) for name, _ in shown), default=0)
    for name, value in shown:
        text = json.dumps(value, default=_as_json, ensure_ascii=False) if _is_nested(value) else str(value)
        click.echo(f"{name:<{width}}  {text}")


def age(moment: datetime | None) -> str:
    """How long ago that was."""
    return "" if moment is None else duration(moment, datetime.now(UTC))


def duration(start: datetime | None, end: datetime | None) -> str:
    """From `start` to `end`, or to now; empty without a start."""
    if start is None:
        return ""
    seconds = int(max((end or datetime.now(UTC)) - start, timedelta()).total_seconds())
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= size:
            rest = seconds % size * 60 // size if unit != "d" else seconds % size // 3600
            smaller = {"d": "h", "h": "m", "m": "s"}[unit]
            return f"{seconds // size}{unit}{rest}{smaller}" if rest else f"{seconds // size}{unit}"
    return f"{seconds}s"


def _is_nested(value: object) -> bool:
    return isinstance(value, dict | list)


def _as_json(value: object) -> object:
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")
