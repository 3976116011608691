"""What the trainers guard against, and the loss of weighted tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from openweights_prefect.errors import InvalidParameterError
from openweights_prefect.jobs.training import collation, job
from openweights_prefect.jobs.training.arguments import choose, is_fresh_adapter, trainer_arguments
from openweights_prefect.jobs.training.examples import Example
from openweights_prefect.jobs.training.loading import load_model
from openweights_prefect.jobs.training.losses import weighted_loss
from openweights_prefect.jobs.training.preferences import Pair
from openweights_prefect.jobs.training.results import save_result
from openweights_prefect.jobs.training.trainers import Diverged
from tests.training.tiny import chats, preferences, small_params, weighted, write


def make_trainer(params: Any, *, kind: str = "fine_tuning", warnings: list[Any] | None = None) -> Any:
    """The trainer of a job, with its test file if it has one."""
    job.quiet()
    transformers.set_seed(params.seed)
    model, tokenizer = load_model(params, "cpu")
    data = job.load_data(params.training_file, {}, params, tokenizer, kind=kind)
    test = job.load_data(params.test_file, {}, params, tokenizer, kind=kind) if params.test_file else None
    choices = choose(params, model, "cpu", kind=kind)
    trainer = job.trainer_class(params, kind)(
        model=model,
        args=trainer_arguments(params, model, "cpu", choices, kind=kind, evaluate=test is not None),
        train_dataset=data.dataset,
        eval_dataset=test.dataset if test else None,
        processing_class=tokenizer,
        check=collation.MaskCheck(data.rows),
        warn=[].append if warnings is None else warnings.append,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def test_the_weighted_loss_and_its_gradient(workdir: Path) -> None:
    """Equal to autograd over all logits at once, in chunks of any size; masked tokens cost nothing."""
    torch.manual_seed(0)
    ids = torch.randint(0, 50, (3, 7))
    weights = torch.randn(3, 7) * (torch.rand(3, 7) > 0.4)
    logits = torch.randn(3, 7, 50, requires_grad=True)
    logps = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    wanted = -(weights[:, 1:] * logps).sum()
    (gradient,) = torch.autograd.grad(wanted, logits)
    for chunk in (1, 4, 100):
        leaf = logits.detach().clone().requires_grad_()
        used = leaf * 1.0  # the loss overwrites what it is given
        loss = weighted_loss(used, ids, weights, chunk_tokens=chunk)
        (2 * loss).backward()
        assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
        assert torch.allclose(leaf.grad, 2 * gradient, atol=1e-6)
    assert weighted_loss(logits.detach().clone(), ids, torch.zeros(3, 7)).item() == 0


def test_the_weighted_loss_in_16_bits_and_without_a_gradient() -> None:
    """It is summed in float32 or better, and evaluation leaves the logits as they are."""
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 300).to(torch.bfloat16)
    ids, weights = torch.randint(0, 300, (2, 5)), torch.ones(2, 5)
    before = logits.clone()
    logps = logits[:, :-1].double().log_softmax(-1).gather(-1, ids[:, 1:, None])
    assert weighted_loss(logits, ids, weights).item() == pytest.approx(-logps.sum().item(), rel=1e-6)
    assert torch.equal(logits, before)


ROW = Example([5, 6, 7, 2], [0.0, 0.0, 1.0, 1.0], [])
PAIR = Pair([5, 6], [7, 2], [8, 9, 2])


@pytest.mark.parametrize(
    ("batch", "right"),
    [
        ({"input_ids": [[5, 6, 7, 2, 2]], "labels": [[-100, -100, 7, 2, -100]]}, True),
        ({"input_ids": [[5, 6, 7, 2, 2]], "labels": [[-100, -100, 7, -100, -100]]}, False),
        ({"input_ids": [[5, 6, 7, 2, 2]], "labels": [[-100, 6, 7, 2, -100]]}, False),
        ({"input_ids": [[5, 6, 7, 2, 2]], "weights": [[0, 0, -1, 1, 0]]}, True),
        ({"input_ids": [[5, 6, 7, 2, 2]], "weights": [[0, 0, 1, 0.5, 0]]}, False),
        ({"input_ids": [[5, 6, 8, 2, 2]], "weights": [[0, 0, 1, 1, 0]]}, False),
    ],
)
def test_the_first_batch_is_compared_with_the_rows(batch: dict[str, Any], right: bool) -> None:
    """Padding is the end-of-sequence token here, and does not count; an end of turn that is masked does."""
    tensors = {name: torch.tensor(values) for name, values in batch.items()}
    tensors["attention_mask"] = torch.tensor([[1, 1, 1, 1, 0]])
    check = collation.MaskCheck([ROW])
    if right:
        check(tensors)
        return
    with pytest.raises(RuntimeError, match="first batch"):
        check(tensors)


def test_packed_rows_are_compared_one_by_one() -> None:
    """In a row of several documents the positions begin anew."""
    batch = {
        "input_ids": torch.tensor([[5, 6, 7, 2, 5, 6, 7, 2]]),
        "labels": torch.tensor([[-100, -100, 7, 2, -100, -100, 7, 2]]),
        "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]]),
    }
    collation.MaskCheck([ROW])(batch)
    batch["labels"][0, 1] = 6
    with pytest.raises(RuntimeError, match=r"has 3 trained tokens .* where the data have 2"):
        collation.MaskCheck([ROW])(batch)


def test_pairs_are_compared_by_their_answers() -> None:
    """Those of the chosen and of the rejected one."""
    batch = {
        "input_ids": torch.tensor([[5, 6, 7, 2, 2], [5, 6, 8, 9, 2]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]),
        "completion_mask": torch.tensor([[0, 0, 1, 1, 0], [0, 0, 1, 1, 1]]),
    }
    collation.MaskCheck([PAIR])(batch)
    batch["completion_mask"][1, 4] = 0
    with pytest.raises(RuntimeError, match=r"has 2 trained tokens .* where the data have 3"):
        collation.MaskCheck([PAIR])(batch)


def test_padding_with_the_end_of_sequence_token_trains_that_token(workdir: Path) -> None:
    """A tokenizer without padding token pads with the other; each row's own end of turn stays trained."""
    config = json.loads((workdir / "model/tokenizer_config.json").read_text())
    (workdir / "model").rename(workdir / "link")
    (workdir / "model").mkdir()
    for path in (workdir / "link").iterdir():
        (workdir / "model" / path.name).symlink_to(path.resolve())
    (workdir / "model/tokenizer_config.json").unlink()
    del config["pad_token"]
    (workdir / "model/tokenizer_config.json").write_text(json.dumps(config))
    write(workdir / "data.jsonl", chats(8))
    trainer = make_trainer(small_params(per_device_train_batch_size=8))
    eos = trainer.processing_class.eos_token_id
    assert trainer.processing_class.pad_token_id == eos
    batch = next(iter(trainer.get_train_dataloader()))
    trained = (batch["labels"] == eos).sum(1)
    assert trained.tolist() == [1] * 8
    assert (batch["attention_mask"] == 0).any()


class Poison(transformers.TrainerCallback):  # type: ignore[misc]
    """Makes the loss of some steps not a number, by way of the weights."""

    def __init__(self, steps: set[int]) -> None:
        self._steps = steps
        self.after: list[bool] = []
        self._kept: Any = None

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step + 1 in self._steps:
            bias = model.get_input_embeddings().weight
            self._kept = bias.data.clone()
            bias.data.fill_(float("nan"))

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if self._kept is not None:
            model.get_input_embeddings().weight.data.copy_(self._kept)
            self._kept = None
        self.after.append(all(torch.isfinite(p).all() for p in model.parameters()))


def test_a_step_without_a_number_is_left_out_and_told(workdir: Path) -> None:
    """The weights stay finite, later losses are logged as they are, and one event warns."""
    write(workdir / "data.jsonl", chats(20))
    warnings: list[Any] = []
    trainer = make_trainer(small_params(max_steps=5, gradient_accumulation_steps=2), warnings=warnings)
    poison = Poison({2, 3})
    trainer.add_callback(poison)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert [loss == loss for loss in losses] == [True, False, False, True, True]
    assert poison.after == [True] * 5
    assert warnings == [{"tag": "warning", "kind": "nan_loss", "step": 2}]


def test_training_ends_when_no_step_has_a_number(workdir: Path) -> None:
    """After three of them, with the steps and what to do."""
    write(workdir / "data.jsonl", chats(20))
    trainer = make_trainer(small_params(max_steps=5))
    trainer.add_callback(Poison({2, 3, 4, 5}))
    with pytest.raises(Diverged, match=r"in the steps 2, 3, 4; training ends. Lower learning_rate=0.01"):
        trainer.train()


@pytest.mark.parametrize(("kind", "loss"), [("fine_tuning", "sft"), ("weighted_sft", "sft")])
def test_the_loss_of_an_evaluation_does_not_depend_on_the_batches(
    workdir: Path, kind: str, loss: str
) -> None:
    """It is the average over all trained tokens, also where the last batch is small."""
    rows = weighted(7) if kind == "weighted_sft" else chats(7)
    write(workdir / "data.jsonl", rows)
    found = [
        make_trainer(
            small_params(test_file="data.jsonl", eval_batch_size=size, loss=loss), kind=kind
        ).evaluate()["eval_loss"]
        for size in (1, 3, 7)
    ]
    assert found[0] == pytest.approx(found[2], rel=1e-5)
    assert found[1] == pytest.approx(found[2], rel=1e-5)


@pytest.mark.parametrize("loss", ["dpo", "orpo"])
def test_pairs_are_evaluated(workdir: Path, loss: str) -> None:
    """With the rewards beside the loss."""
    write(workdir / "data.jsonl", preferences(5))
    trainer = make_trainer(small_params(loss=loss, test_file="data.jsonl", eval_batch_size=3))
    trainer.evaluate()
    [figures] = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert figures["eval_loss"] > 0
    assert "eval_rewards/margins" in figures


def test_an_adapter_is_trained_further_against_what_it_was(workdir: Path) -> None:
    """DPO on an adapter: the first loss is log 2, checkpoints hold one adapter, and a resumed run equals."""
    write(workdir / "data.jsonl", preferences(12))
    params = small_params(loss="dpo", max_steps=4, save_steps=2, deterministic=True)
    first = make_trainer(params)
    first.train()
    result = save_result(
        first.model, first.processing_class, small_params(model="model"), workdir / "uploads"
    )
    (workdir / "model").rename(workdir / "base")
    result.rename(workdir / "model")

    again = make_trainer(params)
    assert not is_fresh_adapter(again.model)
    again.train()
    losses = [entry["loss"] for entry in again.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)
    assert losses[-1] < losses[0]
    assert not [path for path in Path("tmp/checkpoint-2").iterdir() if path.is_dir()]

    resumed = make_trainer(params)
    resumed.train(resume_from_checkpoint="tmp/checkpoint-2")
    pairs = zip(again.model.parameters(), resumed.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_trained_biases_have_no_reference(workdir: Path) -> None:
    """DPO would compare the model with one that is trained along."""
    params = small_params(loss="dpo", lora_bias="all")
    model = load_model(params, "cpu").model
    with pytest.raises(InvalidParameterError, match="lora_bias='all' cannot be used with loss='dpo'"):
        choose(params, model, "cpu", kind="fine_tuning")
