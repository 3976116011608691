"""Tokenizers made on the spot, chat templates as TRL keeps them, and generated ones with an oracle."""

from __future__ import annotations

import functools
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import transformers
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<bos>",
    "<eos>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|user|>",
    "<|assistant|>",
    "<｜User｜>",  # noqa: RUF001 - DeepSeek's bar
    "<｜end▁of▁sentence｜>",  # noqa: RUF001
    "<｜Assistant｜>",  # noqa: RUF001 - DeepSeek's bar
    "<|end|>",
)
CORPUS = [
    "The ship sails to the island at dawn. What is the capital of France? Say it. Please. Aye, matey!",
    "system user assistant model <think> </think> dog soup One two three four\n\nArr.\n",
    "naïve café, straße, 你好世界, привет, 🙂🙃",
]


@functools.cache
def byte_level(
    *, trim_offsets: bool = False, eos: str = "<|im_end|>"
) -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE with few merges, so that characters of several bytes are several tokens."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _finished(tokenizer, eos)


@functools.cache
def metaspace(*, eos: str = "<eos>") -> transformers.PreTrainedTokenizerFast:
    """BPE in the manner of Llama 2 and Gemma: spaces are `▁`, unknown characters fall back to bytes."""
    trained = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    trained.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>"], show_progress=False)
    trained.train_from_iterator(CORPUS[:2], trainer)
    model = json.loads(trained.to_str())["model"]
    # The tokens of bytes are part of the vocabulary, not special tokens.
    vocabulary = {**model["vocab"], **{f"<0x{n:02X}>": len(model["vocab"]) + n for n in range(256)}}
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return _finished(tokenizer, eos, unk_token="<unk>")


def _finished(
    tokenizer: tokenizers.Tokenizer, eos: str, **tokens: str
) -> transformers.PreTrainedTokenizerFast:
    tokenizer.add_special_tokens(list(SPECIAL))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=eos, bos_token="<bos>", pad_token=eos, **tokens
    )


def trl_template(name: str) -> str:
    """A model's own chat template, as TRL ships it."""
    # Found without importing it, which takes seconds.
    package = importlib.util.find_spec("trl")
    assert package is not None
    assert package.origin is not None
    return (Path(package.origin).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Piece:
    """Some rendered text, and whose it is: (message, block), or the end of a message, or nobody's."""

    text: str
    owner: tuple[int, int] | None = None
    ends: int | None = None


@dataclass(frozen=True)
class Scaffold:
    """A chat template that is made up, as Jinja text and as an oracle in Python."""

    bos: str
    before: str  # `{role}` stands for the role
    after: str
    end: str
    trims: str  # "", "trim", "lstrip" or "rstrip"
    drops_thoughts: bool
    thinks: str  # put before the last answer
    moves_system: bool
    shows_length: bool

    @property
    def jinja(self) -> str:
        """The template's text."""
        text = {"": "c", "trim": "c | trim", "lstrip": "c.lstrip()", "rstrip": "c.rstrip()"}[self.trims]
        before = (
            " + ".join(
                part
                for part in (
                    _quoted(self.before.partition("{role}")[0]),
                    "m.role",
                    _quoted(self.before.partition("{role}")[2]),
                )
                if part
            )
            if "{role}" in self.before
            else _quoted(self.before)
        )
        return (
            "{{- " + _quoted(self.bos) + " }}{%- set ns = namespace(first='', seen=false) %}"
            "{%- for m in messages %}{%- set c = m.content %}"
            + (
                "{%- if m.role == 'assistant' and not loop.last and '</think>' in c %}"
                "{%- set c = c.split('</think>')[-1].lstrip('\\n') %}{%- endif %}"
                if self.drops_thoughts
                else ""
            )
            + (
                "{%- if m.role == 'system' and loop.first and not loop.last %}{%- set ns.first = ("
                + text
                + ") + '\\n\\n' %}{%- else %}"
                if self.moves_system
                else ""
            )
            + "{{- "
            + before
            + " }}"
            + ("{{- c | length }}" if self.shows_length else "")
            + (
                "{%- if loop.last and m.role == 'assistant' %}{{- " + _quoted(self.thinks) + " }}{%- endif %}"
                if self.thinks
                else ""
            )
            + "{{- ns.first }}{%- set ns.first = '' %}"
            + "{{- "
            + text
            + " }}{{- "
            + _quoted(self.end + self.after)
            + " }}"
            + ("{%- endif %}" if self.moves_system else "")
            + "{%- endfor %}"
        )

    def render(self, roles: list[str], messages: list[list[str]]) -> list[Piece]:
        """What the template makes of a conversation, piece by piece."""
        pieces = [Piece(self.bos)]
        moved: list[Piece] = []
        for index, (role, blocks) in enumerate(zip(roles, messages, strict=True)):
            last = index == len(messages) - 1
            kept = [(character, number) for number, block in enumerate(blocks) for character in block]
            content = "".join(blocks)
            if self.drops_thoughts and role == "assistant" and not last and "</think>" in content:
                kept = kept[content.rindex("</think>") + len("</think>") :]
                while kept and kept[0][0] == "\n":
                    kept.pop(0)
            length = len(kept)
            while kept and self.trims in ("trim", "lstrip") and kept[0][0].isspace():
                kept.pop(0)
            while kept and self.trims in ("trim", "rstrip") and kept[-1][0].isspace():
                kept.pop()
            text = [Piece(character, (index, number)) for character, number in kept]
            if self.moves_system and role == "system" and index == 0 and not last:
                moved = [*text, Piece("\n\n")]
                continue
            pieces.append(Piece(self.before.replace("{role}", role)))
            pieces.append(Piece(str(length) if self.shows_length else ""))
            pieces.append(Piece(self.thinks if last and role == "assistant" else ""))
            pieces += [*moved, *text, Piece(self.end, ends=index), Piece(self.after)]
            moved = []
        return pieces


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"


SCAFFOLDS = st.builds(
    Scaffold,
    bos=st.sampled_from(["", "<bos>", "<|begin_of_text|>"]),
    before=st.sampled_from(
        [
            "<|im_start|>{role}\n",
            "<|start_header_id|>{role}<|end_header_id|>\n\n",
            "<｜Assistant｜>",  # noqa: RUF001
            "{role}: ",
            "[INST] ",
            "",
            "Aye.",
        ]
    ),
    after=st.sampled_from(["", "\n", "\n\n", " "]),
    end=st.sampled_from(["<|im_end|>", "<end_of_turn>", "<eos>"]),
    trims=st.sampled_from(["", "trim", "lstrip", "rstrip"]),
    drops_thoughts=st.booleans(),
    thinks=st.sampled_from(["", "<think>\n\n</think>\n\n"]),
    moves_system=st.booleans(),
    shows_length=st.sampled_from([False, False, False, True]),
)
WORDS = st.lists(
    st.sampled_from(
        [
            "Aye.",
            "Aye",
            "a",
            "user",
            "assistant",
            "system",
            " ",
            "\n",
            "\n\n",
            "Say it. ",
            "Please",
            "é",
            "你好",
            "🙂",
            "e\u0301",
            "{{ x }}",
            "<b>",
            "'",
            '"',
            "4",
            ": ",
        ]
    ),
    max_size=6,
).map("".join)
THOUGHTS = st.one_of(
    WORDS,
    WORDS,
    WORDS,
    st.builds(lambda thought, answer: f"<think>{thought}</think>{answer}", WORDS, WORDS),
)
