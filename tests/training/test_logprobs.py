"""Log-probabilities: equal to those of all logits, at little memory, with exact averages."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from openweights_prefect.errors import InvalidFileError
from openweights_prefect.jobs.training.logprobs import reader, score, token_logprobs
from openweights_prefect.jobs.training.scored_rows import Nll, Records, load_scored_rows, tagged_blocks
from tests.training.recording import make_model, make_tokenizer, write_jsonl

ROWS = [[256, 5, 9, 257, 257, 3, 8], [256, 7, 7], [256, *range(1, 40), 257]]


def padded() -> tuple[Tensor, Tensor]:
    longest = max(map(len, ROWS))
    ids = torch.tensor([[*row, *[257] * (longest - len(row))] for row in ROWS])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ROWS])
    return ids, mask


def expected(model: Any) -> Tensor:
    """By all logits at once, in float64 after the model."""
    ids, mask = padded()
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits.double()
    values = logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    return values * mask[:, 1:]


def with_lora(model: Any, **settings: Any) -> Any:
    torch.manual_seed(1)
    wrapped = get_peft_model(
        model,
        LoraConfig(task_type="CAUSAL_LM", r=4, lora_dropout=0.5, target_modules=["q_proj"], **settings),
    )
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    return wrapped


MODELS: dict[str, Any] = {
    "qwen3": lambda: make_model("qwen3"),
    "llama, tied": lambda: make_model("llama", tie_word_embeddings=True),
    "lora": lambda: with_lora(make_model("qwen3")),
    "lora, trained head": lambda: with_lora(make_model("qwen3"), modules_to_save=["lm_head"]),
    "gemma2, capped": lambda: make_model("gemma2", final_logit_softcapping=2.0),
    "lora on gemma2": lambda: with_lora(make_model("gemma2", final_logit_softcapping=2.0)),
    "granite, divided": lambda: make_model("granite", logits_scaling=7.0),
    "cohere, scaled": lambda: make_model("cohere", logit_scale=0.3),
    "bfloat16": lambda: make_model("qwen3").to(torch.bfloat16),
}
ALTERED = {"gemma2, capped", "lora on gemma2", "granite, divided", "cohere, scaled"}


@pytest.mark.parametrize("chunk", [1, 7, 16, 1024])
@pytest.mark.parametrize("name", MODELS)
def test_they_are_those_of_all_logits(name: str, chunk: int) -> None:
    """Capped, divided and scaled logits included, whatever the size of the pieces."""
    model = MODELS[name]()
    model.train()
    found = token_logprobs(model, *padded(), chunk_tokens=chunk)
    assert found.dtype == torch.float32
    # A matrix product in bfloat16 may round otherwise for another number of rows.
    tolerance = 0.05 if name == "bfloat16" else 1e-5
    assert (found - expected(model)).abs().max() < tolerance


@pytest.mark.parametrize("name", ["qwen3", "lora", "gemma2, capped"])
def test_mixed_precision_is_that_of_the_model(name: str) -> None:
    """Under autocast they are those of the model's logits under autocast."""
    model = MODELS[name]()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, wanted = token_logprobs(model, *padded()), expected(model)
    assert (found - wanted).abs().max() < 0.05
    assert (found - expected(model)).abs().max() > 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_the_quick_way_is_taken_only_where_it_is_right(name: str) -> None:
    """A model that does more to its logits than its output layer is read by its own logits."""
    model = MODELS[name]().eval()
    read = reader(model, torch.tensor([ROWS[0]]), chunk_tokens=8)
    assert ("_by_logits" in read.__code__.co_names) == (name in ALTERED)


def test_a_cap_that_no_configuration_names_is_noticed() -> None:
    """The logits are compared bit for bit."""
    model = make_model("gemma2", final_logit_softcapping=2.0).eval()
    cap = model.config.final_logit_softcapping
    forward = type(model).forward

    class Hidden(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, **values: Any) -> Any:
            self.config.final_logit_softcapping = cap
            try:
                return forward(self, *args, **values)
            finally:
                self.config.final_logit_softcapping = None

    model.config.final_logit_softcapping = None
    model.__class__ = Hidden
    found = token_logprobs(model, *padded())
    assert (found - expected(model)).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["qwen3", "gemma2, capped"])
def test_logits_are_never_all_in_memory(name: str) -> None:
    """At most a piece of them, whatever the number and the length of the rows."""
    model = MODELS[name]()
    sizes: list[int] = []
    model.get_output_embeddings().register_forward_hook(
        lambda module, args, output: sizes.append(output[..., 0].numel())
    )
    token_logprobs(model, *padded(), chunk_tokens=16)
    assert max(sizes) <= 16


def test_the_model_is_as_before() -> None:
    """Modules that were in evaluation mode stay so, and no gradient comes from it."""
    model = with_lora(make_model())
    model.train()
    layer = model.get_base_model().model.layers[0]
    layer.eval()
    before = [module.training for module in model.modules()]
    found = token_logprobs(model, *padded())
    assert [module.training for module in model.modules()] == before
    assert not found.requires_grad
    assert torch.equal(found, token_logprobs(model, *padded()))  # no dropout


def test_rows_of_any_length_are_scored_in_batches() -> None:
    """Each row is as if it was alone; what looks like padding is not taken for it."""
    model = make_model()
    rows = [*ROWS, [256], []]
    found = dict(score(model, rows, batch_size=2))
    assert [len(found[index]) for index in range(5)] == [6, 2, 40, 0, 0]
    for index, row in enumerate(ROWS):
        alone = token_logprobs(model, torch.tensor([row]), torch.ones(1, len(row), dtype=torch.long))
        assert torch.allclose(torch.tensor(found[index]), alone[0], atol=1e-5)


def test_a_batch_that_finds_no_memory_is_halved() -> None:
    model = make_model()
    forward = model.model.forward

    def small(*args: Any, **values: Any) -> Any:
        if len(values["input_ids"]) > 1:
            raise torch.OutOfMemoryError("too much")
        return forward(*args, **values)

    model.model.forward = small
    found = dict(score(model, ROWS, batch_size=3))
    model.model.forward = forward
    assert found.keys() == {0, 1, 2}
    whole = dict(score(model, ROWS, batch_size=3))
    assert all(torch.allclose(torch.tensor(found[i]), torch.tensor(whole[i]), atol=1e-5) for i in whole)


def conversations(count: int) -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "user", "content": f"Count to {number}."},
                {"role": "assistant", "content": " ".join(map(str, range(number + 1)))},
            ],
            "source": number,
        }
        for number in range(count)
    ]


@pytest.mark.parametrize("batch_size", [1, 3, 5, 7])
def test_the_average_is_over_all_trained_tokens(tmp_path: Path, batch_size: int) -> None:
    """Not over rows or batches: the size of the last batch is without effect."""
    tokenizer, model = make_tokenizer(), make_model()
    path = write_jsonl(tmp_path / "rows.jsonl", conversations(7))
    rows = load_scored_rows(path, tokenizer, flat="responses", max_length=None)
    nll, tokens, total = Nll(), 0, 0.0
    found = dict(score(model, rows.tokens, batch_size=batch_size))
    for index, scored in enumerate(rows.rows):
        nll.add(scored.example, found[index])
        ids = torch.tensor([scored.example.input_ids])
        with torch.no_grad():
            logprobs = model(input_ids=ids).logits.double().log_softmax(-1)
        for place, weight in enumerate(scored.example.weights):
            if weight and place:
                tokens += 1
                total -= logprobs[0, place - 1, ids[0, place]].item()
    assert nll.tokens == tokens
    assert nll.mean == pytest.approx(total / tokens, rel=1e-5)


def test_without_a_trained_token_the_average_is_nan(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": [{"role": "user", "content": "Hello"}]}])
    rows = load_scored_rows(path, make_tokenizer(), flat="responses", max_length=None)
    nll = Nll()
    nll.add(rows.rows[0].example, [-1.0] * (len(rows.tokens[0]) - 1))
    assert (nll.tokens, math.isnan(nll.mean)) == (0, True)


def test_a_record_holds_the_row_and_its_tokens(tmp_path: Path) -> None:
    """From the second on; what is no number becomes null."""
    tokenizer = make_tokenizer()
    path = write_jsonl(tmp_path / "rows.jsonl", conversations(1))
    [scored] = load_scored_rows(path, tokenizer, flat="responses", max_length=None).rows
    values = [-float(place) for place in range(1, len(scored.example.input_ids))]
    values[0] = math.nan
    record = Records(tokenizer).with_tokens(scored, values)
    assert record["source"] == 0
    assert record["messages"] == conversations(1)[0]["messages"]
    assert [token["token_id"] for token in record["tokens"]] == scored.example.input_ids[1:]
    assert [token["logp"] for token in record["tokens"]] == [None, *values[1:]]
    assert "".join(token["token"] for token in record["tokens"]).startswith("user\nCount to 0.<|im_end|>")


BLOCKS: dict[str, Any] = {
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": "Aye. ", "tag": "pirate", "weight": 0.5, "mine": 1},
                {"type": "text", "text": "Yes.", "tag": "plain", "logprobs": False},
            ],
        },
    ]
}


def test_a_block_has_the_sum_of_its_tokens(tmp_path: Path) -> None:
    """And their range, in the list of tokens that begins with the second one."""
    tokenizer, model = make_tokenizer(), make_model()
    path = write_jsonl(tmp_path / "rows.jsonl", [BLOCKS])
    rows = load_scored_rows(path, tokenizer, flat="responses", max_length=None)
    assert rows.in_blocks
    values = dict(score(model, rows.tokens, batch_size=1))[0]
    record = Records.with_blocks(rows.rows[0], values)
    pirate, plain = tagged_blocks(record)
    start, end = pirate["range"]
    assert tokenizer.decode(rows.tokens[0][start + 1 : end + 1]) == "Aye. "
    assert pirate == {
        **BLOCKS["messages"][1]["content"][0],
        "range": [start, end],
        "logprobs": pytest.approx(sum(values[start:end])),
    }
    assert plain["logprobs"] is False
    assert plain["range"][0] == end
    assert "range" not in BLOCKS["messages"][1]["content"][0]


def test_a_block_that_is_cut_has_no_sum(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    path = write_jsonl(tmp_path / "rows.jsonl", [BLOCKS])
    whole = load_scored_rows(path, tokenizer, flat="responses", max_length=None)
    first = whole.rows[0].example.blocks[1]
    rows = load_scored_rows(path, tokenizer, flat="responses", max_length=first.end - 1)
    assert (rows.truncated, whole.truncated) == (1, 0)
    record = Records.with_blocks(rows.rows[0], [-1.0] * (first.end - 2))
    pirate, plain = tagged_blocks(record)
    assert (pirate["logprobs"], pirate["range"], plain["range"]) == (None, None, None)


def test_texts_are_scored_too(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "Once upon a time"}])
    rows = load_scored_rows(path, make_tokenizer(), flat="responses", max_length=None)
    assert not rows.in_blocks
    assert Records.with_blocks(rows.rows[0], []) == {"text": "Once upon a time"}


def test_an_empty_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidFileError, match="is empty"):
        load_scored_rows(write_jsonl(tmp_path / "rows.jsonl", []), make_tokenizer(), flat="all", max_length=9)
