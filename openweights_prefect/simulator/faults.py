"""Faults on request: rules that say which operation goes wrong, how, and how often."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

Stage = Literal["before", "scheduler", "after", "process"]

FAULTS: dict[str, Stage] = {
    "http_error": "before",  # params: status, detail, html
    "capacity": "scheduler",  # params: text, status
    "created_but_500": "after",  # params: body="pod" answers with the whole pod
    "host_lost": "process",  # params: after_s, counted from the start of the container
}
"""The faults, and where in a request or a pod they strike. New ones are added here and at their stage."""

_GLOBS = ("gpu", "cloud", "dc", "image", "podId", "host")


class BadRule(ValueError):
    """A rule that cannot be used."""


@dataclass
class Rule:
    """One fault rule of `POST /_sim/faults`."""

    id: str
    name: str
    match: dict[str, Any] = field(default_factory=dict)
    params: dict[str, Any] = field(default_factory=dict)
    times: int | None = 1
    """How often it strikes; None: always."""
    probability: float = 1.0
    seen: int = 0
    struck: int = 0

    def matches(self, facts: Mapping[str, str]) -> bool:
        """Whether all conditions hold; a condition on a fact that is not known here does not."""
        operation = self.match.get("op", "*")
        if operation not in ("*", facts.get("op", operation)):
            return False
        for key in _GLOBS:
            if key in self.match and not fnmatchcase(facts.get(key, ""), str(self.match[key])):
                return False
        return "name" not in self.match or re.search(self.match["name"], facts.get("name", "")) is not None


class Faults:
    """The rules in force, in the order in which they came."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(f"{seed}:faults")
        self._rules: dict[str, Rule] = {}
        self._added = 0

    def add(self, document: dict[str, Any]) -> Rule:
        """Add a rule; raises `BadRule` for an unknown fault or key."""
        self._added += 1
        try:
            rule = Rule(**{"id": f"f{self._added}", **document})
            re.compile(rule.match.get("name", ""))
        except (TypeError, re.error) as exc:
            raise BadRule(str(exc)) from exc
        if rule.name not in FAULTS:
            raise BadRule(f"unknown fault {rule.name!r}; there are {', '.join(FAULTS)}")
        self._rules[rule.id] = rule
        return rule

    def remove(self, rule_id: str | None = None) -> None:
        """Remove one rule, or all."""
        if rule_id is None:
            self._rules.clear()
        else:
            self._rules.pop(rule_id, None)

    def rules(self) -> list[Rule]:
        """The rules, including those that have struck out."""
        return [*self._rules.values()]

    def take(self, stage: Stage, facts: Mapping[str, str]) -> Rule | None:
        """The rule that strikes now, counted as struck; None if all goes well."""
        for rule in self._rules.values():
            if FAULTS[rule.name] != stage or not rule.matches(facts):
                continue
            rule.seen += 1
            if "nth" in rule.match and rule.seen != rule.match["nth"]:
                continue
            if rule.times is not None and rule.struck >= rule.times:
                continue
            if self._random.random() < rule.probability:
                rule.struck += 1
                return rule
        return None
