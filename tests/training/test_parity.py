"""The losses of each step are those of TRL's own trainers, and of a reference in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from openweights_prefect.jobs.training import collation, job
from openweights_prefect.jobs.training.arguments import choose, trainer_arguments
from openweights_prefect.jobs.training.examples import load_examples
from openweights_prefect.jobs.training.loading import load_model
from openweights_prefect.jobs.training.results import save_result
from openweights_prefect.jobs.training.trainers import Guarded, WeightedTrainer
from tests.training.tiny import chats, preferences, small_params, weighted, write

STEPS = 4
DIVISIONS = [
    pytest.param(4, 1, id="one batch a step"),
    pytest.param(1, 4, id="four batches a step"),
]


def our_losses(params: Any, *, kind: str = "fine_tuning") -> tuple[Guarded, list[float]]:
    """Train as a job does, without what watches it."""
    job.quiet()
    transformers.set_seed(params.seed)
    model, tokenizer = load_model(params, "cpu")
    choices = choose(params, model, "cpu", kind=kind)
    data = job.load_data(params.training_file, {}, params, tokenizer, kind=kind)
    trainer = job.trainer_class(params, kind)(
        model=model,
        args=trainer_arguments(params, model, "cpu", choices, kind=kind, evaluate=False),
        train_dataset=data.dataset,
        processing_class=tokenizer,
        check=collation.MaskCheck(data.rows),
        warn=lambda _: pytest.fail("a step was left out"),
    )
    return trainer, losses(trainer)


def losses(trainer: Any) -> list[float]:
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def bare(params: Any) -> dict[str, Any]:
    """What a script of one's own would set in TRL for the same training."""
    return {
        "output_dir": "bare",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "max_steps": params.max_steps,
        "per_device_train_batch_size": params.per_device_train_batch_size,
        "gradient_accumulation_steps": params.gradient_accumulation_steps,
        "learning_rate": params.learning_rate,
        "warmup_steps": params.warmup_steps,
        "weight_decay": params.weight_decay,
        "seed": params.seed,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }


def bare_model(params: Any) -> dict[str, Any]:
    transformers.set_seed(params.seed)
    return {
        "model": transformers.AutoModelForCausalLM.from_pretrained("model", dtype=torch.float32),
        "processing_class": transformers.AutoTokenizer.from_pretrained("model"),
        "peft_config": LoraConfig(
            task_type="CAUSAL_LM",
            r=params.r,
            lora_alpha=params.lora_alpha,
            use_rslora=params.use_rslora,
            target_modules=params.target_modules,
        )
        if params.is_peft
        else None,
    }


def divided(rows: int, accumulated: int, **values: Any) -> Any:
    return small_params(
        per_device_train_batch_size=rows, gradient_accumulation_steps=accumulated, max_steps=STEPS, **values
    )


@pytest.mark.parametrize(("rows", "accumulated"), DIVISIONS)
@pytest.mark.parametrize("is_peft", [True, False], ids=["LoRA", "all weights"])
@pytest.mark.parametrize("responses_only", [True, False], ids=["responses", "all tokens"])
def test_sft(workdir: Path, rows: int, accumulated: int, is_peft: bool, responses_only: bool) -> None:
    """TRL renders, tokenizes and masks by itself, with the template's generation marks."""
    write(workdir / "data.jsonl", chats(20))
    params = divided(rows, accumulated, is_peft=is_peft, train_on_responses_only=responses_only)
    _, ours = our_losses(params)
    trainer = SFTTrainer(
        args=SFTConfig(**bare(params), assistant_only_loss=responses_only, max_length=None),
        train_dataset=datasets.Dataset.from_list(chats(20)),
        **bare_model(params),
    )
    assert ours == pytest.approx(losses(trainer), rel=1e-5)
    assert len(ours) == STEPS


@pytest.mark.parametrize(("rows", "accumulated"), DIVISIONS)
@pytest.mark.parametrize("is_peft", [True, False], ids=["LoRA", "all weights"])
@pytest.mark.parametrize("loss", ["dpo", "orpo"])
def test_preferences(workdir: Path, rows: int, accumulated: int, is_peft: bool, loss: str) -> None:
    """TRL renders and tokenizes the pairs by itself."""
    write(workdir / "data.jsonl", preferences(20))
    params = divided(rows, accumulated, is_peft=is_peft, loss=loss)
    _, ours = our_losses(params)
    data, model = datasets.Dataset.from_list(preferences(20)), bare_model(params)
    trainer = (
        DPOTrainer(args=DPOConfig(**bare(params), beta=0.1, max_length=None), train_dataset=data, **model)
        if loss == "dpo"
        else ORPOTrainer(
            args=ORPOConfig(**bare(params), beta=0.1, max_length=512), train_dataset=data, **model
        )
    )
    assert ours == pytest.approx(losses(trainer), rel=1e-5)
    assert len(ours) == STEPS


def reference_losses(params: Any, order: list[list[int]], rows: list[Any]) -> list[float]:
    """Weighted SFT as it is defined: one row at a time, all logits in float64, no trainer."""
    transformers.set_seed(params.seed)
    model = load_model(params, "cpu").model.double()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=params.learning_rate, weight_decay=params.weight_decay)
    found = []
    for step, chosen in enumerate(order):
        scale = 0.0 if step == 0 else 1 - (step - 1) / (STEPS - 1)  # one step of warmup, then linear
        optimizer.param_groups[0]["lr"] = params.learning_rate * scale
        loss, total = torch.zeros((), dtype=torch.float64), 0.0
        for index in chosen:
            ids = torch.tensor([rows[index].input_ids])
            weights = torch.tensor(rows[index].weights, dtype=torch.float64)[1:]
            logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            loss = loss - (weights * logps.gather(1, ids[0, 1:, None])[:, 0]).sum()
            total += float(weights.abs().sum())
        loss = loss / total
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        found.append(float(loss.detach()))
    return found


@pytest.mark.parametrize(("rows", "accumulated"), DIVISIONS)
@pytest.mark.parametrize("is_peft", [True, False], ids=["LoRA", "all weights"])
def test_weighted(workdir: Path, rows: int, accumulated: int, is_peft: bool) -> None:
    """Negative weights included; the reference is told the order of the rows and nothing else."""
    path = write(workdir / "data.jsonl", weighted(20))
    params = divided(rows, accumulated, is_peft=is_peft, learning_rate=1e-3)
    trainer, ours = our_losses(params, kind="weighted_sft")
    assert isinstance(trainer, WeightedTrainer)
    batches = [index for batch in trainer.get_train_dataloader().batch_sampler for index in batch]
    order = [batches[start : start + 4] for start in range(0, 4 * STEPS, 4)]
    examples = load_examples(path, trainer.processing_class, max_length=None, mode="weighted")
    assert ours == pytest.approx(reference_losses(params, order, examples.rows), rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "loss"),
    [("fine_tuning", "sft"), ("fine_tuning", "dpo"), ("fine_tuning", "orpo"), ("weighted_sft", "sft")],
)
def test_adapters_reload(workdir: Path, kind: str, loss: str) -> None:
    """Plain PEFT gives the logits of the model that was trained, from a folder with one adapter."""
    rows = preferences(8) if loss != "sft" else weighted(8) if kind == "weighted_sft" else chats(8)
    write(workdir / "data.jsonl", rows)
    trainer, _ = our_losses(small_params(loss=loss, max_steps=2), kind=kind)
    folder = save_result(trainer.model, trainer.processing_class, small_params(), workdir / "uploads")
    ids = torch.tensor([trainer.processing_class("Who are you?")["input_ids"]])
    base = transformers.AutoModelForCausalLM.from_pretrained("model", dtype=torch.float32)
    again = PeftModel.from_pretrained(base, folder).eval()
    with torch.no_grad():
        wanted = trainer.model.eval()(input_ids=ids).logits
        assert torch.allclose(again(input_ids=ids).logits, wanted, atol=1e-6)
        with again.disable_adapter():
            assert not torch.allclose(again(input_ids=ids).logits, wanted, atol=1e-3)
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "model"
    assert not [path for path in folder.iterdir() if path.is_dir()]
