"""Which command an image stands for."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from openweights_prefect.simulator.config import Image

_BUILT_IN = ("sleep", "exit:*", "ignore-term", "env-dump", "fork")
_PROGRAM = Path(__file__).with_name("container_programs.py")


def find_image(name: str, configured: Mapping[str, Image]) -> Image | None:
    """The configured image whose glob matches first, else a built-in one (`sim/...`), else None."""
    for glob, image in configured.items():
        if fnmatchcase(name, glob):
            return image
    if any(fnmatchcase(name, f"sim/{built_in}") for built_in in _BUILT_IN):
        return Image(entrypoint=(sys.executable, "-I", "-S", str(_PROGRAM), name.removeprefix("sim/")))
    return None


def command(image: Image, args: str) -> list[str]:
    """The container's command line: `args` replaces the image's CMD, or, as JSON, its entrypoint too."""
    entrypoint, cmd = image.entrypoint, image.cmd
    override = _json_args(args)
    if override is not None:
        if "entrypoint" in override:
            entrypoint, cmd = tuple(override["entrypoint"]), ()
        cmd = tuple(override.get("cmd", cmd))
    elif args:
        cmd = tuple(shlex.split(args))
    return [*entrypoint, *cmd]


def _json_args(args: str) -> dict[str, list[str]] | None:
    try:
        document = json.loads(args)
    except ValueError:
        return None
    return document if isinstance(document, dict) else None
