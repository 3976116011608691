"""An agent's part in one run: `python run_host.py FOLDER GRACE COMMAND`; without a grace nobody ends it.

Starts the command as an entrypoint is started, ends it when it is ready, and prints how that went.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from pathlib import Path

from openweights_prefect.pod.ending import Ending
from openweights_prefect.pod.processes import RunProcesses, adopt_orphans, all_processes
from openweights_prefect.runtime.wire import RUN_VARIABLE

RUN_ID = "0190c0de-0000-7000-8000-000000000001"


async def main(folder: Path, grace: str, command: str) -> None:
    """Lead one run from its start to its end."""
    adopt_orphans()
    bystander = await asyncio.create_subprocess_exec("sleep", "600")
    spared = await asyncio.create_subprocess_exec("sleep", "600", start_new_session=True)
    processes = RunProcesses(RUN_ID, spared={spared.pid})
    ending = Ending(processes, abandon=lambda: print(json.dumps({"abandoned": True}), flush=True))
    entrypoint = await asyncio.create_subprocess_exec(
        "bash", "-c", command, cwd=folder, env={**os.environ, RUN_VARIABLE: RUN_ID}, start_new_session=True
    )
    ending.started(entrypoint.pid)
    while not (folder / "ready").exists():
        await asyncio.sleep(0.01)
    started = time.monotonic()
    if grace:
        ending.begin("canceled", "by the test", grace_seconds=float(grace))
        ending.begin("lost", "later, and with more time", grace_seconds=1000)
    code = await entrypoint.wait()
    await ending.exited()
    seconds = time.monotonic() - started
    ending.close()
    pids = {int(line) for line in (folder / "pids").read_text().split()}
    living = {process.pid for process in all_processes() if not process.zombie}
    zombies = [each.pid for each in all_processes() if each.zombie and each.parent == os.getpid()]
    print(
        json.dumps(
            {
                "code": code,
                "seconds": seconds,
                "intent": ending.intent,
                "count": len(pids),
                "left": sorted(pids & living),
                "zombies": zombies,
                "bystanders": bystander.returncode is None and spared.returncode is None,
            }
        )
    )
    bystander.kill()
    spared.kill()
    await asyncio.gather(bystander.wait(), spared.wait())


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), *sys.argv[2:]))
