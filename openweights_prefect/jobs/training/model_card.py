"""The model card of a result: what was trained, on what, and how it went."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

Kind = Literal["adapter", "model", "merged"]

_LONGEST = 300
_HUB_MODEL = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# The user's own notes, and what concerns the push or the job and not the model.
_LEFT_OUT = {"meta", "finetuned_model_id", "hf_org", "push", "push_to_private", "job_id_suffix", "output_dir"}
_LEFT_OUT |= {"model_naming_extra_parameters", "wandb_project"}
_WHAT = {
    "adapter": "A LoRA adapter",
    "model": "A fully fine-tuned model",
    "merged": "A fine-tuned model, its LoRA adapter merged into the base",
}


class Losses(NamedTuple):
    """First and last values; None where nothing was measured."""

    first_train: float | None = None
    last_train: float | None = None
    first_eval: float | None = None
    last_eval: float | None = None


def losses(log_history: Sequence[Mapping[str, Any]]) -> Losses:
    """The losses of a trainer's `log_history`."""
    train = [float(entry["loss"]) for entry in log_history if "loss" in entry]
    test = [float(entry["eval_loss"]) for entry in log_history if "eval_loss" in entry]
    ends = [values[end] if values else None for values in (train, test) for end in (0, -1)]
    return Losses(*ends)


def model_card(
    params: Mapping[str, Any], *, job_id: str, kind: Kind, losses: Losses, versions: Mapping[str, str]
) -> str:
    """Markdown with front matter; whatever a parameter holds is shown as text and becomes nothing else.

    The data is named by its file ids and not published; `meta` is left out.

    Args:
        params: The validated parameters of the job.
        job_id: The job that trained it.
        kind: What the folder holds.
        losses: How training went.
        versions: Package -> version.
    """
    title = str(params.get("finetuned_model_id") or job_id)
    files = {name: params[name] for name in ("training_file", "test_file") if params.get(name)}
    shown = {name: value for name, value in sorted(params.items()) if name not in _LEFT_OUT | files.keys()}
    measured = {
        name.replace("_", " "): value for name, value in losses._asdict().items() if value is not None
    }
    sections = [
        _front_matter(params, kind),
        f"# {_text(title)}",
        f"{_WHAT[kind]} of {_text(params['model'])}, trained by job {_text(job_id)} of openweights-prefect.",
        *_table("Loss", ("Measured", "Value"), {name: _number(value) for name, value in measured.items()}),
        *_table("Data", ("Used as", "File id"), files),
        *_table("Parameters", ("Parameter", "Value"), shown),
        *_table("Versions", ("Package", "Version"), versions),
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(params: Mapping[str, Any], kind: Kind) -> str:
    lines = [
        f"library_name: {'peft' if kind == 'adapter' else 'transformers'}",
        "pipeline_tag: text-generation",
    ]
    # The hub refuses a card whose base is not one of its models, such as the result of another job.
    base = "/".join(str(params["model"]).split("/")[:2])
    if _HUB_MODEL.fullmatch(base):
        lines.append(f"base_model: {_scalar(base)}")
        lines.append(f"base_model_relation: {'adapter' if kind == 'adapter' else 'finetune'}")
    tags = ["openweights-prefect", str(params.get("loss", "sft")), *(["lora"] if kind != "model" else [])]
    lines += ["tags:", *(f"- {_scalar(tag)}" for tag in tags)]
    return "\n".join(["---", *lines, "---"])


def _table(title: str, heads: tuple[str, str], rows: Mapping[str, Any]) -> Iterable[str]:
    if not rows:
        return []
    body = [f"| {_text(name)} | {_text(value)} |" for name, value in rows.items()]
    return [f"## {title}", "\n".join([f"| {heads[0]} | {heads[1]} |", "| --- | --- |", *body])]


def _number(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else str(value)


def _scalar(text: str) -> str:
    """A YAML scalar: JSON is one, once the characters are gone that YAML takes for the end of a line."""
    return json.dumps(_printable(text), ensure_ascii=False)


def _text(value: Any) -> str:
    """Character references cannot be Markdown or HTML: everything but letters, digits and spaces is one."""
    shown = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    if len(shown) > _LONGEST:
        shown = f"{shown[:_LONGEST]} (cut)"
    letters = (each if each.isalnum() or each == " " else f"&#{ord(each)};" for each in _printable(shown))
    # Numbers and versions stay readable in the source.
    return re.sub(r"(?<=\d)&#46;(?=\d)", ".", "".join(letters))


def _printable(text: str) -> str:
    return "".join(each if each.isprintable() else " " for each in text)
