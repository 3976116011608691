"""An agent with a preloaded process: `python preloading_host.py FOLDER SOCKETS`.

Runs the same program of ours before it is there, when it is there, and when it has died; one that it refuses;
and prints, of each, in which process its library was imported. Cleans up after each, as after a run.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

from openweights_prefect.pod import cleaning
from openweights_prefect.pod import folder as folders
from openweights_prefect.pod.preloading import Preloading
from openweights_prefect.pod.processes import all_processes
from openweights_prefect.pod.server import serve
from openweights_prefect.runtime import wire
from openweights_prefect.runtime.entrypoint import RunFolder, run_entrypoint

RUN_ID = "0190c0de-0000-7000-8000-000000000001"


async def main(root: Path, sockets: Path) -> None:
    """Be the agent, and the flows of its runs."""
    os.environ[wire.RUN_VARIABLE] = RUN_ID
    os.environ[wire.SOCKET_VARIABLE] = str(sockets / "agent.sock")
    started: list[int] = []
    server = await serve(sockets / "agent.sock", {"started": _note(started), "exited": _note([])})
    preloaded = root / "preloaded"
    preloaded.mkdir()
    (preloaded / "plan.py").write_text((root / "plan.py").read_text())
    seen: dict[str, Any] = {}

    async def run(name: str, **job: Any) -> None:
        os.environ.update(preloading.variables())
        folder = _prepare(root / "runs" / name, sockets / name, job)
        # In a thread with a loop of its own: a flow's requests block, and the agent answers them.
        code = await asyncio.to_thread(
            lambda: asyncio.run(run_entrypoint(folder, folder.job(), job_python=""))
        )
        await cleaning.end_leftovers(RUN_ID)
        seen[name] = {"code": code, **json.loads((folder.work / "seen.json").read_text())}

    async with Preloading(preloaded, job_python="", plan="plan") as preloading:
        (root / "runs").mkdir()
        await run("cold")
        preloading.want()
        seen["before"] = preloading.variables()
        await _ready(preloading)
        seen["preloaded"] = pid = _preloaded()
        await run("warm")
        preloading.want()
        await run("own", env={"MINE": "1"})
        seen["still"] = _preloaded() == pid
        os.kill(pid, 9)
        await run("died")
        preloading.want()
        await _ready(preloading)
        await run("again")
        seen["then"] = _preloaded()
    seen["left"] = [each.pid for each in all_processes() if each.parent == os.getpid() and not each.zombie]
    seen["sockets"] = Path(os.environ["OW_PRELOADED_SOCKET"]).parent.exists()
    seen["started"] = started
    server.close()
    print(json.dumps(seen))


def _prepare(path: Path, sockets: Path, job: dict[str, Any]) -> RunFolder:
    folder = RunFolder(path)
    sockets.mkdir()
    command = "python -m openweights_prefect.pretend look"
    row = {"id": "ftjob-1", "entrypoint": command, "params": {}, "mounts": {}, **job}
    folders.prepare(folder, row, job_socket=sockets / "job.sock", fetch=lambda *_: None)
    # The package with the program that is pretended to be ours.
    (folder.library / "openweights_prefect").unlink()
    (folder.library / "openweights_prefect").symlink_to(path.parents[1] / "package")
    (sockets / "tmp").symlink_to(folder.temporary)
    return folder


def _note(pids: list[int]) -> Any:
    async def answer(pid: int = 0) -> dict[str, Any]:
        pids.append(pid)
        return {}

    return answer


async def _ready(preloading: Preloading) -> None:
    async with asyncio.timeout(30):
        while not preloading.variables():
            await asyncio.sleep(0.01)


def _preloaded() -> int:
    """The only process here that asyncio started and that lasts."""
    [pid] = [each.pid for each in all_processes() if each.parent == os.getpid() and not each.zombie]
    return pid


if __name__ == "__main__":
    asyncio.run(main(*map(Path, sys.argv[1:])))
