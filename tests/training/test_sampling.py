"""Callbacks beside training: what they tell, when, and that training does not notice them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback

from openweights_prefect.errors import InvalidFileError, InvalidParameterError
from openweights_prefect.jobs.training.logprob_callback import logprob_callbacks
from openweights_prefect.jobs.training.logprobs import token_logprobs
from openweights_prefect.jobs.training.reporting import Telemetry, earlier_events
from openweights_prefect.jobs.training.sampling import end_of_turn, load_prompts, sample, sampling_callbacks
from tests.training.recording import (
    Lesson,
    Recording,
    make_model,
    make_tokenizer,
    recording,
    write_jsonl,
)

PROMPTS = "conversations:file-000000000001"
FLAT = "conversations:file-000000000002"
BLOCKS = "conversations:file-000000000003"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Recording]:
    with recording(monkeypatch, tmp_path) as made:
        yield made


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    def message(role: str, content: Any) -> dict[str, Any]:
        return {"role": role, "content": content}

    prompts = [
        {"messages": [message("user", "Hi")], "id": 1},
        {"messages": [message("system", "Be brief."), message("user", "Tell me a long story.")], "id": 2},
        {"messages": [message("user", "Hello"), message("assistant", "Well, ")], "id": 3},
    ]
    flat = [{"messages": [message("user", "Hi"), message("assistant", "a" * count)]} for count in (1, 5, 9)]
    blocks = [
        {
            "messages": [
                message("user", [{"type": "text", "text": "Hi"}]),
                message(
                    "assistant",
                    [
                        {"type": "text", "text": f"Aye {n}. ", "tag": "pirate"},
                        {"type": "text", "text": "No."},
                    ],
                ),
            ]
        }
        for n in range(2)
    ]
    return {
        PROMPTS: str(write_jsonl(tmp_path / "prompts.jsonl", prompts)),
        FLAT: str(write_jsonl(tmp_path / "flat.jsonl", flat)),
        BLOCKS: str(write_jsonl(tmp_path / "blocks.jsonl", blocks)),
    }


def params(**values: Any) -> Any:
    wish = {
        "dataset": PROMPTS,
        "eval_steps": 3,
        "batch_size": 2,
        "tag": "stories",
        "temperature": 0,
        "max_tokens": 8,
        **values,
    }
    return SimpleNamespace(
        sampling_callbacks=[wish],
        logp_callback_datasets={"pirates": BLOCKS, "letters": FLAT},
        eval_every_n_steps=3,
        eval_batch_size=2,
        train_on_responses_only=True,
        max_seq_length=512,
        seed=7,
    )


def callbacks(
    run: Recording, files: dict[str, str], *, earlier: Any = (), **values: Any
) -> tuple[Telemetry, list[TrainerCallback]]:
    telemetry, tokenizer = Telemetry(run.run, earlier=earlier), make_tokenizer()
    made = [
        *logprob_callbacks(params(**values), files, tokenizer, telemetry),
        *sampling_callbacks(params(**values), files, tokenizer, telemetry),
    ]
    return telemetry, made


def greedy(model: Any, ids: list[int], count: int) -> list[int]:
    """One token after the other, without a cache."""
    answer: list[int] = []
    for _ in range(count):
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids + answer])).logits[0, -1].argmax())
        if token == 257:
            break
        answer.append(token)
    return answer


def test_answers_are_the_greedy_ones(files: dict[str, str]) -> None:
    """Of each prompt as if it was alone, though they are of different lengths and answered together."""
    tokenizer, model = make_tokenizer(), make_model()
    prompts = load_prompts(PROMPTS, files, tokenizer)
    ids = [prompt.input_ids for prompt in prompts]
    found = sample(model, tokenizer, ids, batch_size=3, temperature=0, max_tokens=12, seed=1)
    expected = [tokenizer.decode(greedy(model.eval(), row, 12), skip_special_tokens=True) for row in ids]
    assert found == expected
    assert sample(model, tokenizer, ids, batch_size=1, temperature=0, max_tokens=12, seed=1) == expected


def test_prompts_are_answered_or_continued(files: dict[str, str]) -> None:
    tokenizer = make_tokenizer()
    texts = [tokenizer.decode(prompt.input_ids) for prompt in load_prompts(PROMPTS, files, tokenizer)]
    assert texts[0] == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert texts[2] == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nWell, "


def test_sampling_is_repeatable(files: dict[str, str]) -> None:
    """With a temperature the seed decides, not the random numbers of training."""
    tokenizer, model = make_tokenizer(), make_model()
    ids = [prompt.input_ids for prompt in load_prompts(PROMPTS, files, tokenizer)]

    def draw(seed: int) -> list[str]:
        torch.rand(3)
        return sample(model, tokenizer, ids, batch_size=3, temperature=1.0, max_tokens=12, seed=seed)

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_an_answer_ends_with_its_turn() -> None:
    """Also when that is not the end-of-sequence token of the tokenizer or of the model."""
    tokenizer, model = make_tokenizer(), make_model()
    tokenizer.eos_token = "<|im_start|>"
    model.generation_config.eos_token_id = 256
    assert end_of_turn(tokenizer) == 257
    ids = [256, 5, 9]
    with torch.no_grad():
        model.lm_head.weight[257] = 0
        bias = torch.zeros(264)
        bias[257] = 1e4
    model.lm_head.register_forward_hook(lambda module, args, output: output + bias)
    assert sample(model, tokenizer, [ids], batch_size=1, temperature=0, max_tokens=9, seed=1) == [""]


def test_the_models_own_settings_are_not_used() -> None:
    """A repetition penalty or a top-k that a model ships with is not what was asked for."""
    tokenizer, model = make_tokenizer(), make_model()
    ids = [256, 5, 9, 9, 9]
    expected = tokenizer.decode(greedy(model.eval(), ids, 10), skip_special_tokens=True)
    model.generation_config.update(repetition_penalty=1.8, do_sample=True, top_k=1, temperature=0.3)
    assert sample(model, tokenizer, [ids], batch_size=1, temperature=0, max_tokens=10, seed=1) == [expected]


def lora(model: Any) -> Any:
    torch.manual_seed(2)
    return get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", r=4, lora_dropout=0.4, target_modules=["q_proj", "v_proj"])
    )


@pytest.mark.parametrize("kind", ["full", "lora", "checkpointing"])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_training_does_not_notice_the_callbacks(
    run: Recording, files: dict[str, str], tmp_path: Path, kind: str, temperature: float
) -> None:
    """Bit for bit the same losses and weights, with dropout, with sampling at every step."""

    def lesson(name: str) -> Lesson:
        model = make_model(attention_dropout=0.3, use_cache=False)
        model = lora(model) if kind == "lora" else model
        return Lesson(tmp_path / name, model=model, gradient_checkpointing=kind == "checkpointing")

    alone, accompanied = lesson("alone"), lesson("accompanied")
    expected = alone.train([])
    telemetry, made = callbacks(run, files, eval_steps=1, temperature=temperature)
    assert accompanied.train(made) == expected
    telemetry.close()
    assert len(run.events(type="samples")) == 8
    assert not run.events(tag="warning")
    pairs = zip(alone.model.parameters(), accompanied.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    assert not accompanied.model.config.use_cache


def test_the_model_is_as_before(files: dict[str, str]) -> None:
    """Modes, gradient checkpointing, cache and random numbers; also after a failure."""
    tokenizer, model = make_tokenizer(), make_model(use_cache=False)
    model.gradient_checkpointing_enable()
    model.train()
    model.model.layers[0].eval()

    def everything() -> list[Any]:
        modules = [
            (module.training, vars(module).get("gradient_checkpointing")) for module in model.modules()
        ]
        return [modules, model.config.use_cache, torch.get_rng_state().tolist()]

    before = everything()
    sample(model, tokenizer, [[256, 5]], batch_size=1, temperature=1, max_tokens=5, seed=1)
    assert everything() == before
    with pytest.raises(IndexError):
        sample(model, tokenizer, [[256, 999]], batch_size=1, temperature=1, max_tokens=5, seed=1)
    assert everything() == before


def test_samples_are_told(run: Recording, files: dict[str, str], tmp_path: Path) -> None:
    """Before the first step, when due and after the last; the file holds each row with its completion."""
    telemetry, made = callbacks(run, files)
    Lesson(tmp_path / "out").train(made)
    telemetry.close()
    events = run.events(type="samples")
    assert [(event["step"], event["tag"]) for event in events] == [(s, "stories") for s in (0, 3, 6, 7)]
    assert all(event["file"].startswith("samples:") for event in events)
    rows = [json.loads(line) for line in run.file(events[0]).splitlines()]
    assert [row["id"] for row in rows] == [1, 2, 3]
    assert all(isinstance(row["completion"], str) for row in rows)
    assert rows[2]["messages"][-1] == {"role": "assistant", "content": "Well, "}


def test_log_probabilities_are_told(run: Recording, files: dict[str, str], tmp_path: Path) -> None:
    """Of plain messages the average under the dataset's name, and a list of rows with their tokens."""
    telemetry, made = callbacks(run, files)
    lesson = Lesson(tmp_path / "out")
    lesson.train(made)
    telemetry.close()
    events = run.events(type="logprobs")
    assert [(event["step"], event["tag"]) for event in events] == [(s, "letters") for s in (0, 3, 6, 7)]
    last = events[-1]
    assert last["file"].startswith("logp:")
    rows = json.loads(run.file(last))
    assert [row["messages"][1]["content"] for row in rows] == ["a", "aaaaa", "aaaaaaaaa"]
    # Trained on are the letters and the end of the turn.
    trained = [token["logp"] for row in rows for token in answer(row)]
    assert len(trained) == last["tokens"] == 18
    assert last["letters"] == pytest.approx(-sum(trained) / 18, rel=1e-5)
    ids = make_tokenizer()(CHATML_ROW, add_special_tokens=False)["input_ids"]
    exact = token_logprobs(lesson.model, torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long))[0]
    found = torch.tensor([token["logp"] for token in rows[1]["tokens"]])
    assert torch.allclose(found, exact, atol=1e-5)


CHATML_ROW = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\naaaaa<|im_end|>\n"


def answer(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The tokens of the last message and its end: all but the line feed of the template after them."""
    return list(row["tokens"][-len(row["messages"][1]["content"]) - 2 : -1])


def test_blocks_with_a_tag_are_told(run: Recording, files: dict[str, str], tmp_path: Path) -> None:
    telemetry, made = callbacks(run, files)
    Lesson(tmp_path / "out", steps=1).train(made)
    telemetry.close()
    first, _ = run.events(type="logprobs_blockwise")
    assert (first["tag"], first["step"]) == ("pirates", 0)
    assert first["file"].startswith("logp_blockwise:")
    rows = json.loads(run.file(first))
    blocks = run.events(type="logprob_block", step=0)
    assert [(block["text"], block["tag"], block["source"]) for block in blocks] == [
        (f"Aye {n}. ", "pirate", "pirates") for n in range(2)
    ]
    assert [block["logprobs"] for block in blocks] == [
        row["messages"][1]["content"][0]["logprobs"] for row in rows
    ]
    assert {"range", "type"} <= blocks[0].keys()


def test_a_resumed_run_repeats_nothing_and_misses_nothing(
    run: Recording, files: dict[str, str], tmp_path: Path
) -> None:
    """What was lost with a pod about the step of the checkpoint is measured again."""
    telemetry, made = callbacks(run, files)
    Lesson(tmp_path / "out", steps=7, save_strategy="steps", save_steps=3).train(made)
    telemetry.close()
    told = run.events()
    run.agent.earlier = [event for event in told if event["step"] < 3 or event["type"] == "logprobs"]
    telemetry, made = callbacks(run, files, earlier=earlier_events(run.run))
    Lesson(tmp_path / "out", steps=7).train(made, resume=str(tmp_path / "out" / "checkpoint-3"))
    telemetry.close()
    again = run.events()[len(told) :]
    assert [(event["type"], event["step"]) for event in again if event["type"] != "logprob_block"] == [
        (kind, step) for step in (3, 6, 7) for kind in ("logprobs_blockwise", "samples")
    ]


def test_two_datasets_may_share_a_tag(run: Recording, files: dict[str, str], tmp_path: Path) -> None:
    telemetry, tokenizer = Telemetry(run.run), make_tokenizer()
    both = params()
    both.sampling_callbacks.append({**both.sampling_callbacks[0], "dataset": FLAT})
    Lesson(tmp_path / "out", steps=1).train(sampling_callbacks(both, files, tokenizer, telemetry))
    telemetry.close()
    assert [event["dataset"] for event in run.events(type="samples", step=0)] == [PROMPTS, FLAT]


def test_a_failure_is_told_and_training_goes_on(
    run: Recording, files: dict[str, str], tmp_path: Path
) -> None:
    telemetry, made = callbacks(run, files, eval_steps="log")
    expected = Lesson(tmp_path / "one").train([])
    lesson = Lesson(tmp_path / "two")
    lesson.model.generate = broken
    assert lesson.train(made) == expected
    telemetry.close()
    warnings = run.events(tag="warning")
    assert [warning["step"] for warning in warnings] == list(range(8))
    assert warnings[0]["kind"] == "samples_failed"
    assert "no memory" in warnings[0]["error"]


def broken(*_: Any, **__: Any) -> Any:
    raise RuntimeError("no memory")


def test_only_the_first_process_measures(run: Recording, files: dict[str, str], tmp_path: Path) -> None:
    _, made = callbacks(run, files)
    state = transformers.TrainerState(global_step=3, max_steps=7, is_world_process_zero=False)
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    for callback in made:
        callback.on_step_end(arguments, state, transformers.TrainerControl(), model=make_model())
    assert run.events() == []


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "once"}, "Line 1 of 'bad.jsonl' cannot be answered: messages is None"),
        ({"messages": [{"role": "assistant", "content": "Well"}]}, "nothing to answer"),
        ({"messages": [{"role": "user", "content": "<|im_end|>"}]}, "special token"),
    ],
)
def test_prompts_that_cannot_be_answered_are_refused(tmp_path: Path, row: Any, reason: str) -> None:
    path = write_jsonl(tmp_path / "bad.jsonl", [row])
    with pytest.raises(InvalidFileError, match=reason):
        load_prompts(PROMPTS, {PROMPTS: str(path)}, make_tokenizer())


def test_a_dataset_that_is_not_here_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidParameterError, match="not in the job folder"):
        load_prompts(PROMPTS, {}, make_tokenizer())
    with pytest.raises(InvalidFileError, match="is empty"):
        load_prompts(PROMPTS, {PROMPTS: str(write_jsonl(tmp_path / "no.jsonl", []))}, make_tokenizer())
