"""`python -m openweights_prefect.pod`: the first program of a pod."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from openweights_prefect.errors import ConfigurationError
from openweights_prefect.pod import deadman
from openweights_prefect.pod.deadline import Deadline
from openweights_prefect.pod.environment import prepare_environment
from openweights_prefect.pod.session import session_secret
from openweights_prefect.pod.termination import rest
from openweights_prefect.settings import Settings


def main() -> None:
    """Serve until the pod is to end, then never return: a container that exits is started again, and bills.

    Only a signal ends it, which comes from RunPod itself.
    """
    folder = Path.cwd()
    print(f"OpenWeights pod {os.environ.get('OW_POD_ID', 'without a name')} starts.", flush=True)
    deadline = Deadline.of_pod(folder, os.environ)
    if deadline.seconds_left() <= 0:
        print("Its deadline has passed: it does nothing but wait to be ended.", flush=True)
        rest(os.environ)
    guard = deadman.start(deadline, os.environ)  # before there are threads
    try:
        if _serve(folder, deadline, guard):
            return
        print("It has ended its work.", flush=True)
    except ConfigurationError as exc:  # started again, it would meet the same one
        print(f"It cannot work: {exc}", flush=True)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    rest(os.environ)


def _serve(folder: Path, deadline: Deadline, guard: int) -> bool:
    """Be the agent until the pod is to end; True when a signal said so."""
    settings = Settings.load()
    session = session_secret(folder / ".session")
    prepare_environment(settings, os.environ, session)
    from openweights_prefect.pod import service  # imports Prefect, which reads the environment at once

    return service.main(
        settings, os.environ, folder=folder, session=session, deadline=deadline, spared={guard}
    )


if __name__ == "__main__":
    main()
