"""The trainers: those of TRL on rows that are tokens already, and one for weighted tokens.

All of them check what the first batch trains, skip a step whose loss or gradient is not a number, and
average an evaluation over its tokens or pairs, not over its batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import datasets
import torch
import transformers
from torch import Tensor
from transformers.trainer_utils import EvalLoopOutput
from trl import DPOTrainer, SFTTrainer
from trl.experimental.orpo import ORPOTrainer

from openweights_prefect.errors import OpenWeightsError
from openweights_prefect.jobs.training.checkpoints import Resumable
from openweights_prefect.jobs.training.collation import MaskCheck, WeightedCollator, trained_amount
from openweights_prefect.jobs.training.losses import weighted_loss

MOST_BAD_STEPS = 3
"""So many steps in a row without a number as loss end the training."""


class Diverged(OpenWeightsError):
    """Training made no progress any more, for the loss or its gradient was not a number."""


class Guarded(Resumable):
    """Mixed into a trainer, before it: checks that do not change what is trained.

    `warn` is given the data of a warning event.
    """

    # Those of `transformers.Trainer`, which mypy sees nothing of in the control environment.
    accelerator: Any
    args: Any
    eval_dataset: datasets.Dataset | None
    model: Any
    state: Any
    train_dataset: datasets.Dataset
    _tr_loss: Tensor

    def __init__(
        self, *args: Any, check: MaskCheck | None, warn: Callable[[dict[str, Any]], None], **kwargs: Any
    ) -> None:
        self._check, self._warn = check, warn
        self._is_finite: Tensor | None = None
        self._bad_steps: list[int] = []
        self._evaluated = torch.zeros(2, dtype=torch.float64)
        super().__init__(*args, **kwargs)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """As the trainer's; sees whether the loss is a number without waiting for the GPU."""
        if self._check is not None:
            self._check(inputs)
            self._check = None
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
        finite = torch.isfinite(loss)
        self._is_finite = finite if self._is_finite is None else self._is_finite & finite
        return loss

    def _clip_grad_norm(self, model: Any) -> Any:
        """Comes last before the optimizer: a gradient that would ruin the weights is thrown away here."""
        norm = super()._clip_grad_norm(model)  # type: ignore[misc]
        assert self._is_finite is not None
        loss_is_finite = bool(self.accelerator.gather(self._is_finite.float()).min())
        self._is_finite = None
        if loss_is_finite and (norm is None or math.isfinite(norm)):
            self._bad_steps = []
            return norm
        model.zero_grad(set_to_none=True)
        # In float16 a gradient overflows now and then until the scale of the loss is found.
        if not loss_is_finite or not self.args.fp16:
            self._count_bad_step("nan_gradient" if loss_is_finite else "nan_loss")
        return norm

    def _count_bad_step(self, kind: str) -> None:
        step = self.state.global_step + 1
        self._bad_steps.append(step)
        what = "loss" if kind == "nan_loss" else "gradient"
        if len(self._bad_steps) == 1 and self.state.is_world_process_zero:
            self._warn({"tag": "warning", "kind": kind, "step": step})
        print(f"warning: the {what} of step {step} is not a number; the step is left out", flush=True)
        if len(self._bad_steps) >= MOST_BAD_STEPS:
            raise Diverged(
                f"The {what} was not a number in the steps {', '.join(map(str, self._bad_steps))}; training "
                f"ends. Lower learning_rate={self.args.learning_rate:g}, raise warmup_steps or try another "
                "dtype; nothing was saved as a result."
            )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the trainer's; a loss that is not a number does not stay in the sums of later ones."""
        super().log(logs, start_time)  # type: ignore[misc]
        if "loss" in logs and not math.isfinite(logs["loss"]):
            self._tr_loss.zero_()

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As the trainer's; keeps what the average is made of."""
        amount = self.accelerator.gather(trained_amount(inputs).to(self.args.device).reshape(1)).sum()
        output = super().prediction_step(model, inputs, *args, **kwargs)  # type: ignore[misc]
        share = amount.double() / self.accelerator.num_processes
        self._evaluated += torch.stack([output[0].double() * share, share]).cpu()
        return output

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """As the trainer's, but for the loss: the same whatever the batch size is."""
        self._evaluated.zero_()
        output = super().evaluation_loop(  # type: ignore[misc]
            *args, metric_key_prefix=metric_key_prefix, **kwargs
        )
        sums = self.accelerator.gather(self._evaluated.to(self.args.device).unsqueeze(0)).sum(0)
        if sums[1] > 0:
            output.metrics[f"{metric_key_prefix}_loss"] = float(sums[0] / sums[1])
        return output


class SupervisedTrainer(Guarded, SFTTrainer):  # type: ignore[misc]
    """SFT on `labelled` rows."""


class PreferenceTrainer(Guarded, DPOTrainer):  # type: ignore[misc]
    """DPO on `paired` rows, which are not tokenized again."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # A copy of the adapter as reference: either it did its work above, or the model without an adapter
        # is the same. Left in checkpoints, Transformers would load it from them instead of the trained one.
        if "ref" in getattr(self.model, "peft_config", {}):
            self.model.delete_adapter("ref")

    def _prepare_dataset(self, dataset: datasets.Dataset, *_: Any) -> datasets.Dataset:
        return dataset


class OddsRatioTrainer(Guarded, ORPOTrainer):  # type: ignore[misc]
    """ORPO on `paired` rows, which are not tokenized again."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        given = ["prompt_ids", "chosen_ids", "rejected_ids"]
        self.train_dataset = self.train_dataset.remove_columns(given)
        if self.eval_dataset is not None:
            self.eval_dataset = self.eval_dataset.remove_columns(given)

    def tokenize_row(self, feature: Mapping[str, list[int]], model: Any = None) -> dict[str, list[int]]:
        """Lay a pair out as the trainer's collator wants it."""
        prompt = feature["prompt_ids"]
        row = {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
        for side in ("chosen", "rejected"):
            answer = feature[f"{side}_ids"]
            row[f"{side}_input_ids"] = prompt + answer
            row[f"{side}_attention_mask"] = [1] * (len(prompt) + len(answer))
            row[f"{side}_labels"] = [-100] * len(prompt) + answer
        return row


class WeightedTrainer(Guarded, transformers.Trainer):  # type: ignore[misc]
    """Weighted SFT: the sum of `weight * cross entropy` over the sum of the absolute weights of a step.

    The sums are taken over all batches of a step and all processes, so that it does not matter how a step
    is divided.
    """

    def __init__(self, *args: Any, processing_class: Any, **kwargs: Any) -> None:
        collator = WeightedCollator(processing_class.pad_token_id)
        super().__init__(*args, processing_class=processing_class, data_collator=collator, **kwargs)
        # Else the trainer divides the loss by the number of batches of the step once more.
        self.model_accepts_loss_kwargs = True

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Tensor]], num_batches: int, device: Any
    ) -> tuple[list[dict[str, Tensor]], Tensor]:
        """The batches of a step, and the sum of their absolute weights in all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        amounts = [trained_amount(batch).to(device) for batch in batches]
        total = torch.stack(amounts).sum() if amounts else torch.zeros((), device=device)
        return batches, self.accelerator.gather(total.reshape(1)).sum()

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """This batch's part of the loss of its step; without one, the loss of the batch."""
        if num_items_in_batch is None:
            num_items_in_batch = self.accelerator.gather(trained_amount(inputs).reshape(1)).sum()
        outputs = model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False
        )
        total = weighted_loss(outputs.logits, inputs["input_ids"], inputs["weights"])
        # Gradients are averaged over the processes, and the divisor is the sum of all of them.
        loss = total * self.accelerator.num_processes / num_items_in_batch.clamp(min=1e-12)
        return (loss, outputs) if return_outputs else loss
