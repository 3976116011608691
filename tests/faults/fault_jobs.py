"""Job types of the fault tests, and a script that submits: `python fault_jobs.py TAG FILE TIMES`."""

from __future__ import annotations

import sys
from pathlib import Path

from pydantic import BaseModel

from openweights_prefect import Jobs, OpenWeights, register

_PROGRAMS = Path(__file__).parent / "programs"


class SteadyParams(BaseModel):
    """How many events in how many seconds; another tag is another job."""

    tag: str
    events: int = 200
    seconds: float = 6.0


@register("steady")
class Steady(Jobs):
    """Logs numbered events at an even pace."""

    mount = {str(_PROGRAMS / "steady.py"): "steady.py"}  # noqa: RUF012
    params = SteadyParams
    requires_vram_gb = 0

    def get_entrypoint(self, validated_params: SteadyParams) -> str:
        """Run the program."""
        return "python steady.py"


class CommandParams(BaseModel):
    """A shell command; another tag is another job."""

    tag: str
    command: str


@register("command")
class Command(Jobs):
    """Runs any shell command."""

    params = CommandParams
    requires_vram_gb = 0

    def get_entrypoint(self, validated_params: CommandParams) -> str:
        """The command itself."""
        return validated_params.command


def with_file(extra: str) -> type[Steady]:
    """The same type with one more file, which must be uploaded."""

    @register("with_file")
    class WithFile(Steady):
        mount = {**Steady.mount, extra: "extra"}  # noqa: RUF012

    return WithFile


def main(tag: str, extra: str, times: int) -> None:
    """Submit a job that mounts the file `extra`, say so before and after, and wait for it."""
    with_file(extra)
    with OpenWeights() as ow:
        print("creating", flush=True)
        for _ in range(times):
            job = ow.with_file.create(tag=tag)
            print(job.id, flush=True)
        job.wait(progress=False)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
