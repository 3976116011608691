"""Answers prompts with a model folder, before and after its LoRA adapter; runs in the job environment.

Reads a JSON list of prompts from standard input; writes `{"before": [...], "after": [...]}`.
"""

from __future__ import annotations

import argparse
import json
import sys

import torch
import transformers
from peft import PeftModel


def answers(
    model: PeftModel, tokenizer: transformers.PreTrainedTokenizerBase, prompts: list[str]
) -> list[str]:
    """Greedy answers, so that the same weights always say the same."""
    texts = []
    for prompt in prompts:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        output = model.generate(**inputs, do_sample=False, max_new_tokens=32)
        reply = output[0, inputs["input_ids"].shape[1] :]
        texts.append(tokenizer.decode(reply, skip_special_tokens=True).strip())
    return texts


def main() -> None:
    """Load once, answer twice."""
    transformers.utils.logging.disable_progress_bar()
    parser = argparse.ArgumentParser(description="Answer the prompts given as a JSON list on standard input.")
    parser.add_argument("model_folder")
    parser.add_argument("adapter_folder")
    arguments = parser.parse_args()
    prompts = json.load(sys.stdin)
    tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.model_folder)
    base = transformers.AutoModelForCausalLM.from_pretrained(arguments.model_folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, arguments.adapter_folder).eval()
    with model.disable_adapter():
        before = answers(model, tokenizer, prompts)
    json.dump({"before": before, "after": answers(model, tokenizer, prompts)}, sys.stdout)


if __name__ == "__main__":
    main()
