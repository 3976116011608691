"""`python -m openweights_prefect.pod`: the agent."""

from __future__ import annotations

from openweights_prefect.pod.agent import main

main()
