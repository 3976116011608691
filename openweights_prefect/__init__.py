"""GPU jobs as if they were OpenAI calls: `from openweights_prefect import OpenWeights, Jobs, register`."""

from __future__ import annotations

__version__ = "0.1.0"
