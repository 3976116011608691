"""Faults by chance: `preempt=0.2,capacity=0.3` as rules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from openweights_prefect.errors import ConfigurationError
from openweights_prefect.simulator.faults import FAULTS, POD_STAGES, Faults

PREFIX = "chaos:"
"""Rule ids of chaos begin with this."""
SPAN_SECONDS = (5.0, 60.0)
"""A pod is struck at a random moment so long after its container has started."""

_OF_A_POD = (*POD_STAGES, "phase")


def parse_chaos(text: str) -> dict[str, float]:
    """Read `fault=probability[,...]`; raises `ConfigurationError` that names what there is."""
    return checked({name: value for name, _, value in (part.partition("=") for part in _parts(text))})


def checked(chaos: Mapping[str, object]) -> dict[str, float]:
    """The probabilities, if the faults are known and the numbers are between 0 and 1."""
    probabilities = {}
    for name, value in chaos.items():
        if name not in FAULTS:
            raise ConfigurationError(f"{name!r} is not a fault. Write one of {', '.join(sorted(FAULTS))}.")
        try:
            probability = float(str(value))
        except ValueError:
            probability = -1.0
        if not 0 <= probability <= 1:
            raise ConfigurationError(
                f"The probability {value!r} of {name!r} is not between 0 and 1. Write '{name}=0.2'."
            )
        probabilities[name] = probability
    return probabilities


def set_chaos(faults: Faults, chaos: Mapping[str, float]) -> set[str]:
    """Put these in place of the chaos so far, and return the ids of the rules; other rules stay.

    A fault of requests falls at each one with its probability; one of pods strikes that share of the pods.
    """
    for rule in faults.rules():
        if rule.id.startswith(PREFIX):
            faults.remove(rule.id)
    for name, probability in chaos.items():
        new: dict[str, Any] = {"id": PREFIX + name, "name": name, "probability": probability, "times": None}
        if FAULTS[name].stage in _OF_A_POD:
            new["once_per_pod"] = True
        if FAULTS[name].stage in POD_STAGES:
            new["params"] = {"after_s": SPAN_SECONDS}
        faults.add(new)
    return {PREFIX + name for name in chaos}


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
