"""The whole of a custom job: adds two numbers and logs the result as an event of its run."""

from __future__ import annotations

import sys

from openweights_prefect import OpenWeights

ow = OpenWeights()
result = int(sys.argv[1]) + int(sys.argv[2])
ow.run.log({"result": result})
print(f"{sys.argv[1]} + {sys.argv[2]} = {result}")
