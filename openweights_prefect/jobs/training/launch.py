"""One process for each GPU: the program starts itself again under `accelerate`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

_RANK = "RANK"
_ERROR_FILE = "OW_TRAINING_ERROR"


def process_count() -> int:
    """How many processes the job shall have; 1 in a process that was launched already."""
    if _RANK in os.environ:
        return 1
    return max(1, int(os.environ.get("N_GPUS") or 1))


def rank() -> int:
    """The number of this process; that which logs and writes is 0."""
    return int(os.environ.get(_RANK, "0"))


def local_rank() -> int:
    """The number of this process on its machine, which is that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def launch(module: str, arguments: Sequence[str], *, processes: int) -> int:
    """Run a module in so many processes and return their exit code; the error of one is the last line.

    A signal to end is passed on, so that the processes can save what they have.
    """
    with tempfile.TemporaryDirectory(prefix="ow-launch-") as folder:
        error = Path(folder, "error")
        child = subprocess.Popen(
            launch_command(module, arguments, processes=processes),
            env={**os.environ, _ERROR_FILE: str(error)},
        )
        passed_on: list[int] = []

        def pass_on(number: int, _: object) -> None:
            passed_on.append(number)
            child.send_signal(number)

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, pass_on)
        code = child.wait()
        if error.exists():
            print(error.read_text(encoding="utf-8"), file=sys.stderr, flush=True)
    # As a single process says it; the launcher answers 1 to everything.
    return 128 + passed_on[-1] if code and passed_on else 1 if code < 0 else code


def launch_command(module: str, arguments: Sequence[str], *, processes: int) -> list[str]:
    """The command that runs a module in so many processes on this machine."""
    return [
        *(sys.executable, "-m", "accelerate.commands.launch"),
        *("--multi_gpu", "--num_machines", "1", "--num_processes", str(processes)),
        # Any free port; precision and compilation are the trainer's affair.
        *("--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no"),
        *("--module", module, *arguments),
    ]


def report_error(line: str) -> None:
    """Print the line that says why the job failed; of several processes, the first has its say."""
    if _ERROR_FILE not in os.environ:
        print(line, file=sys.stderr, flush=True)
        return
    try:
        with Path(os.environ[_ERROR_FILE]).open("x", encoding="utf-8") as file:
            file.write(line)
    except FileExistsError:
        return
