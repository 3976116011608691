"""`python -m openweights_prefect.simulator`: serve the simulated RunPod on the loopback address."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import signal
import socket
import sys
from pathlib import Path
from types import FrameType

import uvicorn
from filelock import FileLock

from openweights_prefect.errors import ConfigurationError
from openweights_prefect.simulator.app import Simulator
from openweights_prefect.simulator.config import PROFILES, load_config
from openweights_prefect.simulator.warden import start_warden

_HOST = "127.0.0.1"


class _Server(uvicorn.Server):
    """Ends open log streams before it waits for them."""

    def __init__(self, config: uvicorn.Config, simulator: Simulator) -> None:
        super().__init__(config)
        self._simulator = simulator
        simulator.connections = self.server_state.connections

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._simulator.stop_streams()
        super().handle_exit(sig, frame)


def main() -> None:
    """Parse the command line, serve until SIGTERM or SIGINT, and stop the pods."""
    arguments = _arguments()
    folder = arguments.state_dir.absolute()
    try:
        config = load_config(arguments.config, profile=arguments.profile)
        if arguments.time_scale is not None:
            config = dataclasses.replace(config, time_scale=arguments.time_scale)
        folder.mkdir(parents=True, exist_ok=True)
        # Held until the end: a second simulator on the folder would take the first one's pods for lost.
        lock = FileLock(folder / "lock", timeout=0).acquire()
        listener = socket.create_server((_HOST, arguments.port))
    except (ConfigurationError, OSError) as exc:
        sys.exit(f"The simulator cannot start in {str(folder)!r}: {exc}")
    simulator = Simulator(config=config, folder=folder, seed=arguments.seed)
    warden = start_warden(simulator.instance)
    try:
        asyncio.run(_serve(simulator, listener, folder))
    finally:
        if warden.stdin is not None:
            warden.stdin.close()
        warden.wait()
        lock.lock.release()


async def _serve(simulator: Simulator, listener: socket.socket, folder: Path) -> None:
    settings = uvicorn.Config(
        simulator.app, log_level="warning", access_log=False, lifespan="off", timeout_graceful_shutdown=2
    )
    for number in (signal.SIGINT, signal.SIGTERM):
        # uvicorn puts this back after it has served, and repeats the signal: the pods must be stopped first.
        # Not SIG_IGN, which the containers would inherit.
        signal.signal(number, lambda *_: None)
    await simulator.open(f"http://{_HOST}:{listener.getsockname()[1]}")
    try:
        _announce(listener.getsockname()[1], folder)
        await _Server(settings, simulator).serve(sockets=[listener])
    finally:
        await simulator.close()


def _announce(port: int, folder: Path) -> None:
    base = f"http://{_HOST}:{port}"
    line = {
        "event": "listening",
        "port": port,
        "base_url": base,
        "rest": f"{base}/v2",
        "graphql": f"{base}/graphql",
        "control": f"{base}/_sim",
        "control_token_file": str(folder / "control_token"),
    }
    print(json.dumps(line), flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m openweights_prefect.simulator", description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="port on 127.0.0.1; 0 takes a free one")
    parser.add_argument(
        "--state-dir", type=Path, required=True, help="folder of pods, logs, state and control token"
    )
    parser.add_argument("--config", type=Path, help="JSON file; the keys are those of SimulatorConfig")
    parser.add_argument("--seed", type=int, default=0, help="seed of ids, timings and faults")
    parser.add_argument(
        "--profile", choices=PROFILES, default="fast", help="how long each step of a pod takes"
    )
    parser.add_argument("--time-scale", type=float, help="simulated seconds in a real one")
    return parser.parse_args()


if __name__ == "__main__":
    main()
