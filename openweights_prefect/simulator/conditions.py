"""What `GET /_sim/wait` can wait for: `pod.phase==UP`, `pods.up>=50`, `alive==0`."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from typing import Any

from openweights_prefect.simulator.model import Pod
from openweights_prefect.simulator.store import State

_EXPRESSION = re.compile(r"\s*([\w.]+)\s*(==|!=|>=|<=|>|<)\s*([\w.:-]+)\s*")
_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}


class BadCondition(ValueError):
    """An expression that says nothing."""


def parse(expression: str, pod_id: str | None) -> Callable[[State], bool]:
    """Read `<what><operator><value>`; raises `BadCondition`.

    `pod.<field>` is a field of the pod `pod_id`, of which `pod.phase` is `gone` when there is no such pod;
    `pods.<phase>` how many pods of clients are in a phase; `alive` how many are not terminated; `created` how
    many there have been.
    """
    match = _EXPRESSION.fullmatch(expression)
    if match is None:
        raise BadCondition(f"{expression!r} is not `<what><operator><value>`, such as `pod.phase==UP`")
    what, sign, text = match.groups()

    def holds(state: State) -> bool:
        value = _value(state, what, pod_id)
        wanted = float(text) if isinstance(value, int | float) else text.lower()
        given = value if isinstance(value, int | float) else str(value).lower()
        return _OPERATORS[sign](given, wanted)

    holds(State())  # Raises for what there is not.
    return holds


def _value(state: State, what: str, pod_id: str | None) -> object:
    clients = [pod for pod in state.pods.values() if pod.owner == "client"]
    subject, _, name = what.partition(".")
    match subject:
        case "pod" if pod_id is not None:
            return _field(state.pods.get(pod_id), name)
        case "pods":
            return sum(pod.phase.value == name.lower() for pod in clients)
        case "alive":
            return sum(pod.phase.value != "terminated" for pod in clients)
        case "created":
            return state.created
    raise BadCondition(
        f"{what!r} is none of `pod.<field>` (with `pod=ID`), `pods.<phase>`, `alive`, `created`"
    )


def _field(pod: Pod | None, name: str) -> object:
    if name not in Pod.__dataclass_fields__:
        raise BadCondition(f"a pod has no {name!r}")
    return "gone" if pod is None else vars(pod)[name]
