"""What a training will cost: a guess from the size of the model and the data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from openweights_prefect.jobs.model_shape import Shape
from openweights_prefect.provisioning.hardware import catalogue_offers, choose_offers
from openweights_prefect.types.hardware import Needs

EFFICIENCY = (0.08, 0.35)
"""Share of a card's peak that training has, at worst and at best."""
SETUP_HOURS = (4 / 60, 20 / 60)
"""Until a pod is there and the model is on it, at best and at worst."""

# Dense TFLOP/s in 16 bits with float32 sums, as the vendor states them.
_PEAKS = {
    "A100": 312, "A100S": 312, "A100S_40GB": 312, "A40": 150, "A4000": 77, "A4500": 95, "A5000": 111,
    "A6000": 155, "6000Ada": 182, "B200": 2250, "B300": 2250, "H100N": 835, "H100P": 756, "H100S": 989,
    "H200": 989, "H200N": 835, "L4": 121, "L40": 181, "L40S": 362, "RTX3070": 41, "RTX3080": 60,
    "RTX3080Ti": 68, "RTX3090": 71, "RTX3090Ti": 80, "RTX4070Ti": 80, "RTX4080": 98, "RTX4090": 165,
}  # fmt: skip
_OTHER_PEAK = 60


@dataclass(frozen=True, kw_only=True)
class CostGuess:
    """A range, least first, for one run that is not interrupted."""

    hardware: str
    price_per_hour: float
    hours: tuple[float, float]
    usd: tuple[float, float]
    assumptions: str


def total_steps(params: Mapping[str, Any], rows: int) -> int:
    """Steps of a training on this many rows with one GPU, none of them packed."""
    batches = math.ceil(rows / params["per_device_train_batch_size"])
    steps: int = params["epochs"] * math.ceil(batches / params["gradient_accumulation_steps"])
    return min(steps, params["max_steps"]) if params["max_steps"] else steps


def guess_cost(
    shape: Shape | None, params: Mapping[str, Any], needs: Needs, *, rows: int, tokens: int
) -> CostGuess | None:
    """What training on `rows` rows of together `tokens` tokens costs on the first choice of the catalogue.

    None where the size of the model is unknown, or nothing fits.
    """
    offers = choose_offers(catalogue_offers(), needs)
    if shape is None or not offers or not rows:
        return None
    [offer, *_] = offers
    trained = total_steps(params, rows)
    batch = params["per_device_train_batch_size"] * params["gradient_accumulation_steps"]
    passes = min(trained * batch / rows, params["epochs"])
    # Two per weight and token for a pass forward, which is made again for its gradients; as many for the
    # gradients of what is computed, and of the weights if those are trained.
    per_weight = (6 if params["is_peft"] else 8) + (2 if params["loss"] == "dpo" else 0)
    work = per_weight * shape.active_parameters * tokens * passes
    peak = 1e12 * _PEAKS.get(offer.gpu_name, _OTHER_PEAK) * offer.count
    low, high = EFFICIENCY
    worst, best = (work / (peak * share) / 3600 for share in (low, high))
    hours = (best + SETUP_HOURS[0], worst + SETUP_HOURS[1])
    return CostGuess(
        hardware=str(offer),
        price_per_hour=offer.price_per_hour,
        hours=hours,
        usd=(hours[0] * offer.price_per_hour, hours[1] * offer.price_per_hour),
        assumptions=(
            f"{per_weight} FLOP for each token and each of {shape.active_parameters / 1e9:.2g} billion "
            f"weights, at {low:.0%} to {high:.0%} of the card's peak; {60 * SETUP_HOURS[0]:.0f} to "
            f"{60 * SETUP_HOURS[1]:.0f} minutes for the pod and the model; packaged prices; evaluations, "
            "sampling and lost pods not counted"
        ),
    )
