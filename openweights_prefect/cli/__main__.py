"""`python -m openweights_prefect.cli`: the command `ow`."""

from __future__ import annotations

from openweights_prefect.cli.main import main

main(prog_name="ow")
