"""The job of the fault tests: numbered events and lines, at an even pace."""

from __future__ import annotations

import json
import time
from pathlib import Path

from openweights_prefect import OpenWeights

params = json.loads(Path("params.json").read_text(encoding="utf-8"))
ow = OpenWeights()
for number in range(params["events"]):
    ow.run.log({"n": number})
    print("line", number)
    time.sleep(params["seconds"] / params["events"])
print("done")
