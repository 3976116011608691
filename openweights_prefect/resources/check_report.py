"""What a check has found, for programs, terminals and notebooks."""

from __future__ import annotations

import html
import io
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from openweights_prefect.errors import InvalidRequestError
from openweights_prefect.jobs.memory import MemoryEstimate
from openweights_prefect.resources.training_cost import CostGuess
from openweights_prefect.types.explanation import span, usd

if TYPE_CHECKING:
    from rich.text import Text

_PARTS = {
    "weights_gb": "weights",
    "adapters_gb": "adapters",
    "gradients_gb": "gradients",
    "optimizer_gb": "optimizer",
    "activations_gb": "activations",
    "logits_gb": "logits",
    "kv_cache_gb": "cache while sampling",
    "overhead_gb": "CUDA and gaps",
}
_SOURCES = {
    "config": "from the model's configuration",
    "name": "from the size in the model's name",
    "unknown": "a default: nothing is known of the model",
}
# What a terminal or a browser would act on: controls, and what changes the direction of text.
_HIDDEN = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff]"
)
_STYLES = {"+": "green", "-": "red", "·": "dim"}
_COLOURS = {"+": "#1a7f37", "-": "#cf222e", "·": "#888888"}
_WIDTH = 110


class Segment(NamedTuple):
    """A part of a row, and how much predicting it counts: 0 is not trained, below 0 is made less likely."""

    text: str
    weight: float

    @property
    def mark(self) -> str:
        """Without colours: `+` trained, `-` made less likely, `·` not trained."""
        return "+" if self.weight > 0 else "-" if self.weight < 0 else "·"


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """A data file as training reads it."""

    total: int
    """Rows of the file."""
    rows: int
    """Those that are left to train on."""
    truncated: int
    dropped: int
    copies: int
    """Rows that are equal to one before them."""
    tokens: int
    """Of one epoch; of pairs, the prompts counted twice."""
    trained_tokens: int
    eos_trained: int | None
    """Rows whose end of turn is trained; None for pairs."""
    lengths: dict[str, int]
    """Tokens of a row, after cutting: `p50`, `p95` and `max`."""
    notes: tuple[str, ...]
    examples: tuple[tuple[Segment, ...], ...]
    """The first rows."""

    @property
    def trained_share(self) -> float:
        """Of the tokens."""
        return self.trained_tokens / self.tokens if self.tokens else 0.0


@dataclass(frozen=True, kw_only=True, repr=False)
class CheckReport:
    """What a training would do with its data, what it needs and costs: to `print`, or for a notebook."""

    job_type: str
    errors: tuple[InvalidRequestError, ...]
    """What would make the training fail, or meaningless."""
    warnings: tuple[str, ...]
    not_checked: str | None
    """Why the data was not looked at; None when it was."""
    training: DataReport | None
    test: DataReport | None
    steps: int | None
    memory: MemoryEstimate
    cost: CostGuess | None = field(default=None)

    @property
    def ok(self) -> bool:
        """Whether everything was checked and no error was found."""
        return not self.errors and self.not_checked is None

    def raise_for_errors(self) -> None:
        """Raise the first error, which `create` would raise, too."""
        if self.errors:
            raise self.errors[0]

    def __repr__(self) -> str:
        return f"<CheckReport {self._verdict()}>"

    def __str__(self) -> str:
        """As text, with colours when printed to a terminal, unless `NO_COLOR` is set."""
        from rich.console import Console

        page = io.StringIO()
        in_colour = sys.stdout.isatty()
        console = Console(file=page, force_terminal=in_colour, width=None if in_colour else _WIDTH)
        for line in self._text():
            console.print(line, soft_wrap=True)
        return page.getvalue().rstrip("\n")

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th style='text-align:left;vertical-align:top'>{_escaped(name)}</th>"
            f"<td style='text-align:left'>{_escaped(value)}</td></tr>"
            for name, value in self._facts()
        )
        troubles = "".join(
            f"<p style='color:{colour}'><b>{kind}</b> {_escaped(text)}</p>"
            for kind, text, colour in self._troubles()
        )
        examples = "".join(
            f"<pre style='white-space:pre-wrap;border-left:3px solid #ccc;padding-left:6px'>{row}</pre>"
            for row in map(_html_row, self._examples())
        )
        title = f"<b>{_escaped(f'ow.{self.job_type}')}: {_escaped(self._verdict())}</b>"
        legend = f"<p>{_LEGEND}</p>" if examples else ""
        return f"<div>{title}<table>{rows}</table>{troubles}{legend}{examples}</div>"

    # What both show ---------------------------------------------------------------------------

    def _verdict(self) -> str:
        verdict = "errors" if self.errors else "ok" if self.not_checked is None else "data not checked"
        number = len(self.warnings)
        return f"{verdict}, {number} warning{'s' if number > 1 else ''}" if number else verdict

    def _facts(self) -> Iterator[tuple[str, str]]:
        for name, data in (("training file", self.training), ("test file", self.test)):
            if data is not None:
                yield name, "\n".join(_described(data))
        if self.steps is not None:
            yield "steps", f"{self.steps:,} with one GPU, none of the rows packed"
        yield "GPU memory", "\n".join(_memory(self.memory))
        if self.cost is not None:
            yield "cost", "\n".join(_cost(self.cost))

    def _troubles(self) -> Iterator[tuple[str, str, str]]:
        for error in self.errors:
            yield "error:", str(error), _COLOURS["-"]
        if self.not_checked is not None:
            yield "not checked:", self.not_checked, "#9a6700"
        for warning in self.warnings:
            yield "warning:", warning, "#9a6700"

    def _examples(self) -> tuple[tuple[Segment, ...], ...]:
        return self.training.examples if self.training else ()

    def _text(self) -> Iterator[Text]:
        from rich.text import Text

        yield Text(f"ow.{self.job_type}: {self._verdict()}", style="bold red" if self.errors else "bold")
        for name, value in self._facts():
            first, *further = _plain(value).split("\n")
            yield Text(f"  {name:<15}{first}")
            yield from (Text(f"  {'':<15}{line}") for line in further)
        for kind, text, _ in self._troubles():
            style = "red" if kind == "error:" else "yellow"
            yield Text.assemble((kind, f"bold {style}"), " ", (_plain(text), style))
        for number, row in enumerate(self._examples(), start=1):
            yield Text(f"row {number}" + (f"   ({_LEGEND})" if number == 1 else ""), style="bold")
            for segment in row:
                yield Text(f"  {segment.mark} {_shown(segment)}", style=_STYLES[segment.mark])


_LEGEND = "+ trained, - made less likely, · not trained"


def _described(data: DataReport) -> Iterator[str]:
    cut = f", {data.truncated:,} cut" if data.truncated else ""
    dropped = f", {data.dropped:,} left out" if data.dropped else ""
    copies = f", {data.copies:,} copies" if data.copies else ""
    yield f"{data.total:,} rows{cut}{dropped}{copies}"
    yield f"{data.tokens:,} tokens, of which {data.trained_tokens:,} ({data.trained_share:.0%}) are trained"
    lengths = data.lengths
    yield f"tokens of a row: {lengths['p50']:,} (median), {lengths['p95']:,} (95 %), {lengths['max']:,} (max)"
    if data.eos_trained is not None:
        yield f"the end of turn is trained in {data.eos_trained:,} of {data.rows:,} rows"


def _memory(memory: MemoryEstimate) -> Iterator[str]:
    size = "" if memory.parameters is None else f", {_number(memory.parameters)} weights"
    yield f"{memory.requires_vram_gb} GB ({_SOURCES[memory.source]}{size})"
    parts = [
        f"{name} {getattr(memory, part):.1f}"
        for part, name in _PARTS.items()
        if getattr(memory, part) >= 0.05
    ]
    if parts:
        yield ", ".join(parts)


def _cost(cost: CostGuess) -> Iterator[str]:
    least, most = cost.usd
    yield f"a guess: {usd(least)} to {usd(most)}, {_hours(cost.hours[0])} to {_hours(cost.hours[1])}"
    yield f"on {cost.hardware}"
    yield f"({cost.assumptions})"


def _number(count: int) -> str:
    return f"{count / 1e9:.3g} billion" if count >= 1e9 else f"{count / 1e6:.3g} million"


def _hours(hours: float) -> str:
    return span(3600 * hours)


def _visible(match: re.Match[str]) -> str:
    code = ord(match.group())
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def _plain(text: str) -> str:
    """Text with nothing in it that a terminal would act on."""
    return _HIDDEN.sub(_visible, text)


def _shown(segment: Segment) -> str:
    weight = "" if segment.weight in (0, 1, -1) else f"[{segment.weight:g}] "
    return weight + _plain(segment.text).replace("\t", "→").replace("\n", "↵")


def _escaped(text: str) -> str:
    return html.escape(_plain(text)).replace("\n", "<br>")


def _html_row(row: tuple[Segment, ...]) -> str:
    return "".join(
        f"<span style='color:{_COLOURS[each.mark]}' title='weight {each.weight:g}'>"
        f"{html.escape(_plain(each.text))}</span>"
        for each in row
    )
