"""`python -m openweights_prefect.pod`: the agent of a pod."""

from __future__ import annotations

import os

from openweights_prefect.pod.environment import prepare_environment
from openweights_prefect.settings import Settings


def main() -> None:
    """Prepare the environment, then import what reads it."""
    settings = Settings.load()
    prepare_environment(settings, os.environ)
    from openweights_prefect.pod import agent  # imports Prefect, which reads the environment at once

    agent.main(settings)


if __name__ == "__main__":
    main()
