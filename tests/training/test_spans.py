"""Where texts go under chat templates as they are in use, and under some that answer to marks."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from openweights_prefect.jobs.training.conversations import ChatTemplate
from openweights_prefect.jobs.training.spans import locate
from tests.training import templates

THOUGHT = "<think>dog</think>\n\n"
CHAT = [
    ("system", ["Be kind."]),
    ("user", ["Say it. ", "Please 你好 🙂"]),
    ("assistant", [THOUGHT, "Arr. "]),
    ("user", ["Aye", "", "\nAye\n"]),
    ("assistant", [THOUGHT, "Aye."]),
]
WHOLE = [blocks for _, blocks in CHAT]


def found(template: str, chat: list[tuple[str, list[str]]]) -> list[list[str | None]]:
    """The text at each block's place."""
    tokenizer = templates.byte_level()
    tokenizer.chat_template = template
    renderer = ChatTemplate(tokenizer)
    roles = [role for role, _ in chat]
    messages = [blocks for _, blocks in chat]
    rendered = renderer.render(roles, ["".join(blocks) for blocks in messages])
    spans = locate(rendered, messages, lambda contents: renderer.render(roles, contents))
    return [[None if span is None else rendered[slice(*span)] for span in line] for line in spans]


def trimmed(messages: list[list[str]]) -> list[list[str]]:
    """Without the outer white space of each message."""
    return [[*blocks[:-1], blocks[-1].rstrip()] for blocks in messages]


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("qwen2_5", WHOLE),
        ("phi3", WHOLE),
        ("llama3_1", trimmed(WHOLE)),
        ("gemma3", trimmed(WHOLE)),
        # The white space after a dropped thought is in the thought's block.
        ("deepseek_r1_distill", [*WHOLE[:2], ["\n\n", "Arr. "], WHOLE[3], ["\n\n", "Aye."]]),
        ("qwen3", [*WHOLE[:2], [None, "Arr. "], WHOLE[3], ["<think>\ndog\n</think>\n\n", "Aye."]]),
    ],
)
def test_templates_in_use(name: str, wanted: list[list[str | None]]) -> None:
    """Blocks are found in the templates that TRL ships, dropped thoughts and moved texts included."""
    assert found(templates.trl_template(name), CHAT) == wanted


TALK = [("user", ["Aye"]), ("assistant", ["user", " Aye."]), ("user", ["Aye"])]
LOOP = "{% for m in messages %}<|im_start|>{{ m.role }}\n%s<|im_end|>\n{% endfor %}"


@pytest.mark.parametrize(
    ("expression", "wanted"),
    [
        ("{{ m.content | upper }}", [["AYE"], ["USER", "AYE."], ["AYE"]]),
        ("{{ m.content | tojson }}", [["Aye"], ["user", " Aye."], ["Aye"]]),
        ("{{ m.content | length }}{{ m.content }}", [["Aye"], ["user", " Aye."], ["Aye"]]),
        ("{% if m.role != 'user' %}{{ m.content }}{% endif %}", [[None], ["user", " Aye."], [None]]),
        ("{{ m.content[:4] }}", [["Aye"], ["user", None], ["Aye"]]),
        (
            "{% if m.content.startswith('A') %}!{% endif %}{{ m.content }}",
            [["Aye"], ["user", " Aye."], ["Aye"]],
        ),
    ],
)
def test_templates_that_answer_to_the_text(expression: str, wanted: list[list[str | None]]) -> None:
    """Found, or reported as dropped; never somewhere else."""
    got = found(LOOP.replace("%s", expression), TALK)
    for line, wanted_line in zip(got, wanted, strict=True):
        for text, wanted_text in zip(line, wanted_line, strict=True):
            assert text in (wanted_text, None, "")
    if "[:4]" not in expression:
        assert [line for line in got if any(line)] == [line for line in wanted if any(line)]


def test_delimiters_end_like_scaffold() -> None:
    """The `>` of a dropped `</think>` is not taken for that of the header before the answer."""
    template = (
        "{% for m in messages %}<｜Assistant｜>{{ m.content.split('</think>')[-1] }}<|im_end|>{% endfor %}"  # noqa: RUF001
    )
    assert found(template, [("assistant", ["<think>x</think>Arr."])]) == [["Arr."]]
    assert found(template, [("assistant", ["<think>x</think>"])]) == [[""]]


def test_private_use_characters_in_the_text() -> None:
    """Texts may hold the characters that marks are made of."""
    assert found(templates.CHATML, [("user", ["a\U000f0000b", "c"])]) == [["a\U000f0000b", "c"]]
    both = "a\U000f0000\U00100000b"
    assert found(templates.CHATML, [("user", [both])]) == [[both]]
    assert found(templates.CHATML, [("user", [both]), ("assistant", [both, "x"])]) != [[both], [both, "y"]]


def test_renderings_do_not_grow_with_the_conversation() -> None:
    """Two hundred messages are rendered as often as four."""
    tokenizer = templates.byte_level()
    tokenizer.chat_template = templates.trl_template("qwen3")
    template = ChatTemplate(tokenizer)

    def renderings(turns: int) -> int:
        roles, messages = ["user", "assistant"] * turns, [["Aye "], [THOUGHT, "Arr."]] * turns
        calls = 0

        def render(contents: Sequence[str]) -> str:
            nonlocal calls
            calls += 1
            return template.render(roles, contents)

        rendered = template.render(roles, ["".join(blocks) for blocks in messages])
        assert all(line[-1] is not None for line in locate(rendered, messages, render))
        return calls

    assert renderings(100) == renderings(2) <= 12
