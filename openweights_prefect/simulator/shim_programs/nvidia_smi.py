"""`nvidia-smi` of a simulated pod; run as a file with the path of its cards, standard library alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

_UNITS = {"memory": " MiB", "used_memory": " MiB", "utilization": " %", "power": " W", "clocks": " MHz"}


def main(arguments: list[str]) -> int:
    """Answer the queries that scripts ask; anything else gets the summary."""
    state = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    options = _options(arguments[1:])
    cards = [card for card in state["gpus"] if options.get("id", str(card["index"])) == str(card["index"])]
    if not cards:
        print("No devices were found")
        return 6
    if "list-gpus" in options:
        for card in cards:
            print(f"GPU {card['index']}: {card['name']} (UUID: {card['uuid']})")
        return 0
    if "query-gpu" in options:
        return _table(options["query-gpu"], [_gpu_fields(card, state) for card in cards], options)
    if "query-compute-apps" in options:
        return _table(options["query-compute-apps"], state["compute_apps"], options)
    _summary(cards, state)
    return 0


def _options(arguments: list[str]) -> dict[str, str]:
    options: dict[str, str] = {}
    short = {"-L": "list-gpus", "-i": "id"}
    words = iter(arguments)
    for word in words:
        name, has_value, value = word.removeprefix("--").partition("=")
        name = short.get(word, name)
        if not has_value and name in ("id", "query-gpu", "query-compute-apps", "format"):
            value = next(words, "")
        options[name] = value
    return options


def _gpu_fields(card: dict[str, Any], state: dict[str, Any]) -> dict[str, Any]:
    fields = {
        "index": card["index"],
        "count": len(state["gpus"]),
        "name": card["name"],
        "gpu_name": card["name"],
        "uuid": card["uuid"],
        "gpu_uuid": card["uuid"],
        "driver_version": state["driver"],
        "memory.total": card["memory_mib"],
        "memory.used": 0,
        "memory.free": card["memory_mib"],
        "utilization.gpu": 0,
        "utilization.memory": 0,
        "temperature.gpu": 31,
        "pstate": "P8",
        "ecc.mode.current": card["ecc"],
        "ecc.mode.pending": card["ecc"],
    }
    for kind in ("corrected", "uncorrected"):
        errors = card["ecc_errors"] if kind == "uncorrected" or card["ecc_errors"] == "[N/A]" else 0
        for span in ("volatile", "aggregate"):
            for part in ("total", "device_memory", "dram"):
                fields[f"ecc.errors.{kind}.{span}.{part}"] = errors
    return fields


def _table(query: str, rows: list[dict[str, Any]], options: dict[str, str]) -> int:
    names = [name.strip() for name in query.split(",")]
    style = options.get("format", "").split(",")
    if "csv" not in style:
        print('"--format=" option is missing its value or it is not csv.')
        return 2
    unknown = [name for row in rows for name in names if name not in row]
    if unknown:
        print(f'Field "{unknown[0]}" is not a valid field to query.')
        return 2
    if "noheader" not in style:
        print(", ".join(name + _unit(name, " [{}]") for name in names))
    for row in rows:
        print(", ".join(_cell(name, row[name], plain="nounits" in style) for name in names))
    return 0


def _cell(name: str, value: Any, *, plain: bool) -> str:
    return str(value) if plain or not isinstance(value, int) else f"{value}{_unit(name, ' {}')}"


def _unit(name: str, pattern: str) -> str:
    unit = _UNITS.get(name.partition(".")[0], "").strip()
    return pattern.format(unit) if unit else ""


def _summary(cards: list[dict[str, Any]], state: dict[str, Any]) -> None:
    print(f"NVIDIA-SMI {state['driver']}   Driver Version: {state['driver']}   CUDA Version: {state['cuda']}")
    for card in cards:
        print(f"| {card['index']}  {card['name']} |  0MiB / {card['memory_mib']}MiB | 0% Default |")
    print("No running processes found")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
