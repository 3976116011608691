"""Log-probabilities of given tokens under a model, without ever holding all of its logits."""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

_PROBE_TOKENS = 16
# Names in the configuration of a model that does more to its logits than its output layer does:
# `final_logit_softcapping` (Gemma), `logit_scale` (Cohere), `logits_scaling` (Granite) and the like.
_ALTERS_LOGITS = re.compile(r"logits?_(soft_?cap|scal|mup)|soft_?cap|(lm_head|output)_multiplier")

Reader = Callable[[Tensor, Tensor], Tensor]
"""From token ids and mask, both (rows, tokens), to the log-probabilities (rows, tokens - 1)."""


@torch.no_grad()  # type: ignore[untyped-decorator]  # mypy sees no torch in the control environment
def token_logprobs(
    model: Any, input_ids: Tensor, attention_mask: Tensor, *, chunk_tokens: int = 1024
) -> Tensor:
    """`log p(token t + 1 | tokens <= t)` as float32 (rows, tokens - 1); 0 where the mask says padding.

    Padding is on the right. Equal to `log_softmax` over all logits of the model as it is, in evaluation mode;
    at most `chunk_tokens` positions of logits are in memory at a time.
    """
    with evaluating(model):
        return reader(model, input_ids[:1, :_PROBE_TOKENS], chunk_tokens=chunk_tokens)(
            input_ids, attention_mask
        )


@torch.no_grad()  # type: ignore[untyped-decorator]  # mypy sees no torch in the control environment
def score(
    model: Any, rows: Sequence[Sequence[int]], *, batch_size: int, chunk_tokens: int = 1024
) -> Iterator[tuple[int, list[float]]]:
    """Yield each row's index and log-probabilities (one fewer than its tokens), the longest rows first.

    Rows of like length go together; a batch that the GPU has no memory for is halved. The model is in
    evaluation mode while this runs, also between two rows.
    """
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
    # A single token has no log-probability.
    scored = [index for index in order if len(rows[index]) > 1]
    yield from ((index, []) for index in order if len(rows[index]) <= 1)
    if not scored:
        return
    device = next(model.parameters()).device
    with evaluating(model):
        probe = torch.tensor([list(rows[scored[0]][:_PROBE_TOKENS])], device=device)
        read = reader(model, probe, chunk_tokens=chunk_tokens)
        batches = [scored[start : start + batch_size] for start in range(0, len(scored), batch_size)]
        while batches:
            batch = batches.pop(0)
            try:
                values = read(*_padded([rows[index] for index in batch], device)).tolist()
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    raise
                half = len(batch) // 2
                batches[:0] = [batch[:half], batch[half:]]
                torch.cuda.empty_cache()
                continue
            for index, row in zip(batch, values, strict=True):
                yield index, row[: len(rows[index]) - 1]


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode within; afterwards each module is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def precision(args: TrainingArguments) -> contextlib.AbstractContextManager[Any]:
    """The automatic mixed precision that training runs under, for forward passes beside it."""
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    return torch.autocast(args.device.type, dtype=dtype) if dtype else contextlib.nullcontext()


def reader(model: Any, probe: Tensor, *, chunk_tokens: int) -> Reader:
    """Choose how to read log-probabilities; the model must be in evaluation mode.

    The quick way, hidden states and then the output layer piece by piece, is taken when on the `probe` tokens
    it gives bit for bit the model's own logits and the configuration names nothing that alters them.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if _is_plain(base, probe):
        return lambda ids, mask: _by_hidden_states(base, ids, mask, chunk_tokens)
    sliced = "logits_to_keep" in inspect.signature(type(base).forward).parameters
    return lambda ids, mask: _by_logits(model, ids, mask, chunk_tokens, sliced=sliced)


def _is_plain(base: Any, probe: Tensor) -> bool:
    if type(base).forward.__module__.startswith("unsloth") or _alters_logits(base.config):
        return False
    mask = torch.ones_like(probe)
    try:
        logits = base.get_output_embeddings()(_hidden_states(base, probe, mask))
        expected = base(input_ids=probe, attention_mask=mask, use_cache=False).logits
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return False
    return logits.shape == expected.shape and bool(torch.equal(logits.to(expected.dtype), expected))


def _alters_logits(config: Any) -> bool:
    settings = {**vars(config), **vars(config.get_text_config())}
    return any(
        _ALTERS_LOGITS.search(name) and value not in (None, 1, False) for name, value in settings.items()
    )


def _hidden_states(base: Any, ids: Tensor, mask: Tensor) -> Tensor:
    output: Tensor = base.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    return output


def _by_hidden_states(base: Any, ids: Tensor, mask: Tensor, chunk_tokens: int) -> Tensor:
    head = base.get_output_embeddings()
    real = mask[:, 1:].bool()
    hidden = _hidden_states(base, ids, mask)[:, :-1][real]
    targets = ids[:, 1:][real]
    chunks = zip(hidden.split(chunk_tokens), targets.split(chunk_tokens), strict=True)
    result = torch.zeros(real.shape, dtype=torch.float32, device=ids.device)
    found = [_logprobs(head(states), tokens).to(ids.device) for states, tokens in chunks]
    result[real] = torch.cat(found) if found else result[real]
    return result


def _by_logits(model: Any, ids: Tensor, mask: Tensor, chunk_tokens: int, *, sliced: bool) -> Tensor:
    """By the model's own logits: some rows at a time, or a part of one row when that is long."""
    length = ids.shape[1]
    rows = max(1, chunk_tokens // length)
    step = chunk_tokens if sliced and length > chunk_tokens else length
    result = torch.zeros(ids[:, 1:].shape, dtype=torch.float32, device=ids.device)
    for row in range(0, len(ids), rows):
        some, masked = ids[row : row + rows], mask[row : row + rows]
        for start in range(0, length - 1, step):
            end = min(start + step, length - 1)
            keep = {"logits_to_keep": torch.arange(start, end, device=ids.device)} if step < length else {}
            logits = model(input_ids=some, attention_mask=masked, use_cache=False, **keep).logits[
                :, : end - start
            ]
            result[row : row + rows, start:end] = _logprobs(logits, some[:, start + 1 : end + 1])
    return result * mask[:, 1:]


def _logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    logits = logits.float()
    tokens = tokens.to(logits.device)
    return logits.gather(-1, tokens[..., None])[..., 0] - logits.logsumexp(-1)


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids padded on the right, and the mask by length: a token may have the id of padding."""
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=device)
    return ids, mask
