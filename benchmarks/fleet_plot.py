"""The replays as a Markdown table and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fleet_replay import Outcome

_COLORS = {"run": "#4878a8", "boot": "#e8a33d", "idle": "#c85250"}


def markdown(outcomes: Sequence[Outcome], *, least_usd: float, clairvoyant_usd: float) -> str:
    """One row a policy; the cost also in multiples of the lower bound."""
    lines = [
        "| policy | cost | of the bound | run | boot | idle | wait p50 | wait p95 | pods |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for outcome in outcomes:
        shares = [outcome.run_usd, outcome.boot_usd, outcome.idle_usd]
        cells = [
            outcome.name,
            f"${outcome.usd:.2f}",
            f"{outcome.usd / least_usd:.2f}x",
            *(f"{abs(round(100 * usd / outcome.usd)):d} %" for usd in shares),
            f"{outcome.wait_p50 / 60:.1f} min",
            f"{outcome.wait_p95 / 60:.1f} min",
            str(len(outcome.pods)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    references = {"knows the future, nobody waits": clairvoyant_usd, "lower bound: the work alone": least_usd}
    for name, usd in references.items():
        lines.append(f"| {name} | ${usd:.2f} | {usd / least_usd:.2f}x | | | | | | |")
    return "\n".join(lines) + "\n"


def draw(path: Path, outcomes: Sequence[Outcome], *, least_usd: float, clairvoyant_usd: float) -> None:
    """Cost by what it was spent on, and how long jobs waited; the suffix names the format."""
    # Takes a second, which only those who draw should pay.
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams.update({"svg.hashsalt": "fleet", "svg.fonttype": "none", "font.size": 9})
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    cost, wait = figure.subplots(1, 2, width_ratios=(3, 2))
    _draw_cost(cost, outcomes, least_usd=least_usd, clairvoyant_usd=clairvoyant_usd)
    _draw_waits(wait, outcomes)
    figure.savefig(path, dpi=110, metadata={"Date": None} if path.suffix == ".svg" else None)


def _draw_cost(axes: Any, outcomes: Sequence[Outcome], *, least_usd: float, clairvoyant_usd: float) -> None:
    names = [_two_lines(outcome.name) for outcome in outcomes]
    left = [0.0] * len(outcomes)
    for kind, color in _COLORS.items():
        usd = [max(0.0, getattr(outcome, f"{kind}_usd")) for outcome in outcomes]
        axes.barh(names, usd, left=left, color=color, label=kind)
        left = [start + each for start, each in zip(left, usd, strict=True)]
    for row, outcome in enumerate(outcomes):
        axes.text(outcome.usd, row, f" ${outcome.usd:.2f}", va="center")
    axes.axvline(least_usd, color="black", linewidth=1, label="lower bound")
    axes.axvline(
        clairvoyant_usd, color="black", linewidth=1, linestyle=":", label="knows the future, nobody waits"
    )
    axes.set_xlim(0, 1.15 * max(left))
    axes.invert_yaxis()
    axes.set_xlabel("cost of the trace, USD")
    axes.legend(loc="upper center", bbox_to_anchor=(0.4, -0.14), ncols=3, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_waits(axes: Any, outcomes: Sequence[Outcome]) -> None:
    for outcome in outcomes:
        waits = sorted(seconds / 60 for seconds in outcome.waits)
        shares = [(number + 1) / len(waits) for number in range(len(waits))]
        # The last two are nearly the same.
        width, style = (2.4 if outcome.slug == "ours" else 1.3), (":" if outcome.slug == "no_reuse" else "-")
        axes.step(
            waits, shares, where="post", linewidth=width, linestyle=style, label=outcome.name.split(" (")[0]
        )
    axes.set_xscale("log")
    axes.set_xticks([0.1, 1, 10, 100], ["0.1", "1", "10", "100"])
    axes.set_ylim(0, 1)
    axes.set_xlabel("minutes from submit to the begin of the work")
    axes.set_ylabel("share of the jobs")
    axes.legend(loc="upper center", bbox_to_anchor=(0.4, -0.14), ncols=2, frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _two_lines(name: str) -> str:
    """The rule above whose it is."""
    rule, _, whose = name.partition(" (")
    return f"{rule}\n({whose}" if whose else rule
