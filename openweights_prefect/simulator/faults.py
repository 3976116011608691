"""Faults on request: rules that say which operation goes wrong, how, and how often."""

from __future__ import annotations

import random
import re
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple

Stage = Literal[
    "transport",  # before the first check of a request
    "account",  # when the key has been read
    "before",  # in place of the operation
    "scheduler",  # when a host is looked for
    "after",  # the operation is done, its answer is not
    "read",  # in what GET and list show of the pods
    "response",  # in the fields of a pod
    "catalog",  # in the catalogue
    "phase",  # on the way to a running container
    "process",  # in the container
    "projection",  # in what is told of the container
]


class Fault(NamedTuple):
    """A way to go wrong."""

    stage: Stage
    effect: str
    operation: str = ""
    """The only operation that it can strike."""


FAULTS: dict[str, Fault] = {
    # Of one request
    "refuse": Fault("transport", "the connection is reset, nothing is done"),
    "hang": Fault("transport", "no answer for `seconds` (120), then a reset; nothing is done"),
    "slow_body": Fault("transport", "the answer's body comes over `seconds` (5)"),
    "truncated_json": Fault("transport", "the body ends after `fraction` (0.5) of it, as if whole"),
    "key_revoked": Fault("account", "401 for this key from now on"),
    "balance": Fault("account", "the account has `balance` (0) USD from now on"),
    "spend_limit": Fault("account", "the account may spend `per_hour` (0) USD an hour from now on"),
    "http_error": Fault("before", "`status` (500), `detail`; `html`: a page in place of JSON"),
    "rate_limited": Fault("before", "429 with `retry_after` (12) seconds, for the `window` (minute)"),
    "schema_outage": Fault("before", "the 400 of RunPod's outage of 2026-08-28", "pods.create"),
    "capacity": Fault("scheduler", "no instances: `text`, `status` (400)", "pods.create"),
    "created_but_500": Fault("after", "a pod behind a 500; `body`: pod shows it", "pods.create"),
    "created_but_timeout": Fault("after", "a pod, no answer for `hold_s` (120), a reset", "pods.create"),
    "created_but_reset": Fault("after", "a pod, and a reset before the first byte", "pods.create"),
    "duplicate_create": Fault("after", "two pods, one of them in the answer", "pods.create"),
    "delete_404": Fault("after", "404, and the pod lives on", "pods.delete"),
    "delete_500": Fault("after", "500, although the pod is gone", "pods.delete"),
    "delete_ignored": Fault("after", "204, and the pod lives on", "pods.delete"),
    "list_truncated": Fault(
        "read", "the newest `fraction` (0.5) is missing; `cursor`: behind a cursor", "pods.list"
    ),
    "list_page_size": Fault("read", "pages of `n` (1) pods", "pods.list"),
    "clock_skew": Fault("response", "`createdAt` is off by `seconds` (3600)"),
    "catalog_lies": Fault("catalog", "availability is `level` (HIGH), whatever there is", "catalog"),
    # Of one pod
    "visibility": Fault("read", "missing from GET and list for `seconds` (5)"),
    "alloc_stall": Fault("phase", "never gets a machine"),
    "slow_pull": Fault("phase", "the pull takes `seconds` (60)"),
    "pull_stuck": Fault("phase", "the pull never ends"),
    "pull_auth": Fault("phase", "the registry says `unauthorized`"),
    "pull_missing": Fault("phase", "the registry says `manifest unknown`"),
    "error_state": Fault("phase", "ERROR in place of a container"),
    "cuda_mismatch": Fault("phase", "the driver is too old for the image; no container, for ever"),
    "container_error": Fault("phase", "`OCI runtime create failed`, again and again"),
    "zero_gpu": Fault("process", "`nvidia-smi` finds no devices"),
    "missing_gpu": Fault("process", "`nvidia-smi` finds `missing` (1) fewer"),
    "ecc_errors": Fault("process", "`nvidia-smi` counts `errors` (7) uncorrected on the first card"),
    "pod_death": Fault("process", "SIGKILL; `mode`: restart (default) or exited"),
    "host_lost": Fault("process", "the pod vanishes with its host"),
    "preempt": Fault("process", "SIGTERM, a grace, SIGKILL; `then`: exited (default) or vanish"),
    "maintenance": Fault("process", "its host stands still for `seconds` (60), unbilled"),
    "freeze": Fault("process", "SIGSTOP for `seconds` (60)"),
    "network_cut": Fault("process", "no network from the start of its container"),
    "host_unreachable": Fault("process", "nothing gets in; it runs on"),
    "disk_full": Fault("process", "no file can grow beyond `megabytes` (1)"),
    "runtime_null": Fault("projection", "`runtime` is null, for `seconds` or for ever"),
    "runtime_stale": Fault("projection", "`runtime` stands still, also when the container is dead"),
}
"""The faults, where they strike and what they do, with their `params` and the defaults of those."""

POD_STAGES: tuple[Stage, ...] = ("process", "projection")
"""Rules of these strike running pods when they are added, others when they start; `after_s` later."""

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
    once_per_pod: bool = False
    """A pod that it spared, it spares for ever."""
    seen: int = 0
    struck: int = 0

    @property
    def stage(self) -> Stage:
        """Where it strikes."""
        return FAULTS[self.name].stage

    def number(self, name: str, default: float) -> float:
        """A parameter that is a number."""
        return float(self.params.get(name, default))

    def matches(self, facts: Mapping[str, str]) -> bool:
        """Whether all conditions hold; a condition on a fact that is not known here does not."""
        operation = self.match.get("op", "*")
        if operation not in ("*", facts.get("op", operation)):
            return False
        if FAULTS[self.name].operation not in ("", facts.get("op", "")):
            return False
        for key in _GLOBS:
            if key in self.match and not fnmatchcase(facts.get(key, ""), str(self.match[key])):
                return False
        return "name" not in self.match or re.search(self.match["name"], facts.get("name", "")) is not None


class Faults:
    """The rules in force, in the order in which they came."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(f"{seed}:faults")
        self._rules: dict[str, Rule] = {}
        self._spared: set[tuple[str, str]] = set()
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

    def take(
        self,
        stage: Stage,
        facts: Mapping[str, str],
        *,
        among: Container[str] = FAULTS,
        new: Container[str] | None = None,
    ) -> Rule | None:
        """The rule that strikes now, counted as struck; None if all goes well.

        Only faults `among` these count, and of the rules only those with an id in `new`, if it is given.
        """
        for rule in self._rules.values():
            asked = rule.stage == stage and rule.name in among and (new is None or rule.id in new)
            if asked and rule.matches(facts) and self._falls(rule, facts):
                rule.struck += 1
                return rule
        return None

    def _falls(self, rule: Rule, facts: Mapping[str, str]) -> bool:
        rule.seen += 1
        if "nth" in rule.match and rule.seen != rule.match["nth"]:
            return False
        if rule.times is not None and rule.struck >= rule.times:
            return False
        mark = (rule.id, facts.get("podId", ""))
        if rule.once_per_pod and mark in self._spared:
            return False
        if rule.once_per_pod:
            self._spared.add(mark)
        return self.random.random() < rule.probability
