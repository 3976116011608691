"""Finds where each block of a conversation went in the text that a chat template made of it.

The conversation is rendered again with private-use characters as marks round each message's text. Marks
that vanish without a trace when they are taken out again tell the place exactly, under any template; a
template that answers to them is asked in other ways. A place that is not certain is None, never a guess.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

Render = Callable[[Sequence[str]], str]
"""Renders the conversation with these contents of its messages."""

_PLANES = (0xF0000, 0x100000)
_PLANE_SIZE = 0xFFFE
_WORD = _PLANE_SIZE - 1
# Starts of words, where a template that drops a chain of thought may begin: not in the middle of a
# delimiter such as `</think>`, and not before white space, which it may want to strip.
_WORD_START = re.compile(r"(?:^|(?<=[\s>\]]))[^\s<>\[\]|｜]")  # noqa: RUF001 - DeepSeek's bar
_INNER_START = re.compile(r"(?:(?<=[\s>\]]))[<\[](?!/)")


class Span(NamedTuple):
    """A range of characters."""

    start: int
    end: int


class _Region(NamedTuple):
    """Where the part `[first, last)` of a message's text went."""

    start: int
    end: int
    first: int
    last: int


class _Mark(NamedTuple):
    number: int
    position: int


def locate(rendered: str, messages: Sequence[Sequence[str]], render: Render) -> list[list[Span | None]]:
    """Where each block of each message is in `rendered`.

    None for a block that the template dropped or whose place is not certain. White space round a message
    is part of it if the template kept it. Renders at most twelve times, each with the whole conversation.
    """
    marker = _Marker.free_of(rendered, messages, render)
    if marker is None:
        regions = _unique(rendered, ["".join(blocks) for blocks in messages], scaffold="")
    else:
        regions = marker.regions()
    spans = [_in_region(rendered, region, blocks) for region, blocks in zip(regions, messages, strict=True)]
    unknown = [index for index, found in enumerate(spans) if found is None and len(messages[index]) > 1]
    marked = marker.blocks(unknown) if marker is not None and unknown else {}
    result: list[list[Span | None]] = []
    for index, found in enumerate(spans):
        region = regions[index]
        if found is not None:
            result.append(found)
        elif region is None:
            result.append([None] * len(messages[index]))
        elif len(messages[index]) == 1:
            result.append([Span(region.start, region.end)])
        else:
            result.append(marked.get(index) or _searched(rendered, region, messages[index]))
    return result


class _Marker:
    """Renders one conversation with marks and reads where they went."""

    def __init__(self, rendered: str, messages: Sequence[Sequence[str]], render: Render, plane: int) -> None:
        self._rendered = rendered
        self._messages = messages
        self._contents = ["".join(blocks) for blocks in messages]
        self._render = render
        self._plane = plane
        self._marks = re.compile(f"[{chr(plane)}-{chr(plane + _PLANE_SIZE - 1)}]")

    @classmethod
    def free_of(cls, rendered: str, messages: Sequence[Sequence[str]], render: Render) -> _Marker | None:
        """With marks that the text itself does not use; None when there are none, or not enough."""
        if 2 * sum(len(blocks) + 1 for blocks in messages) >= _WORD:
            return None
        for plane in _PLANES:
            marker = cls(rendered, messages, render, plane)
            if not marker._marks.search(rendered):
                return marker
        return None

    def regions(self) -> list[_Region | None]:
        """Where each message is, from the way of asking that the template does not answer to."""
        cores = [_core(content) for content in self._contents]
        whole = [Span(0, len(content)) for content in self._contents]
        trimmed_away = [
            None if core.start == core.end < len(text) else core
            for core, text in zip(cores, self._contents, strict=True)
        ]
        filled = [core if core.start < core.end else None for core in cores]
        tried: list[Sequence[Span | None]] = []
        for ranges in (whole, cores, trimmed_away, filled):
            regions = self._marked(ranges) if ranges not in tried else None
            if regions is not None:
                return self._with_white_space(regions)
            tried.append(ranges)
        return (
            self._ended(cores)
            or self._substituted(whole)
            or self._substituted(cores)
            or self._searched(cores)
        )

    def blocks(self, indices: Iterable[int]) -> dict[int, list[Span | None]]:
        """Where the blocks of these messages are, whose text the template changed."""
        inserts: list[list[tuple[int, int]]] = [[] for _ in self._contents]
        first: dict[int, int] = {}
        number = 0
        for index in indices:
            first[index] = number
            offset = 0
            for block in self._messages[index]:
                start, end = _core(block)
                inserts[index] += [(offset + start, 2 * number), (offset + end, 2 * number + 1)]
                offset += len(block)
                number += 1
        marks = self._probe(inserts)
        if marks is None:
            return {}
        places = dict(marks)
        return {
            index: [
                Span(places[2 * n], places[2 * n + 1]) if 2 * n in places and 2 * n + 1 in places else None
                for n in range(number, number + len(self._messages[index]))
            ]
            for index, number in first.items()
        }

    def _probe(self, inserts: Sequence[Sequence[tuple[int, int]]]) -> list[_Mark] | None:
        """Render with marks at these places of each message; None when the template answers to them."""
        contents = []
        for content, marks in zip(self._contents, inserts, strict=True):
            parts, last = [], 0
            for position, number in marks:
                parts += [content[last:position], chr(self._plane + number)]
                last = position
            contents.append("".join(parts) + content[last:])
        text = self._rendering(contents)
        if text is None or self._marks.sub("", text) != self._rendered:
            return None
        found = enumerate(self._marks.finditer(text))
        return [_Mark(ord(match.group()) - self._plane, match.start() - n) for n, match in found]

    def _rendering(self, contents: Sequence[str]) -> str | None:
        try:
            return self._render(contents)
        except ValueError:  # The template refuses what the marks make of it.
            return None

    def _marked(self, ranges: Sequence[Span | None]) -> list[_Region | None] | None:
        inserts = [
            [] if span is None else [(span.start, 2 * index), (span.end, 2 * index + 1)]
            for index, span in enumerate(ranges)
        ]
        marks = self._probe(inserts)
        if marks is None:
            return None
        places = dict(marks)
        regions: list[_Region | None] = []
        cut: dict[int, Span] = {}
        for index, span in enumerate(ranges):
            start, end = places.get(2 * index), places.get(2 * index + 1)
            if span is not None and start is None and end is not None:
                cut[index] = span
            if span is None or start is None or end is None or start > end:
                regions.append(None)
            else:
                regions.append(_Region(start, end, *span))
        if cut:
            for index, region in self._without_their_start(ranges, cut).items():
                regions[index] = region
        return regions

    def _without_their_start(
        self, ranges: Sequence[Span | None], cut: dict[int, Span]
    ) -> dict[int, _Region | None]:
        """Where the rest of messages is whose start was dropped with its mark, such as a chain of thought."""
        words: dict[int, list[int]] = {}
        inserts: list[list[tuple[int, int]]] = []
        for index, span in enumerate(ranges):
            if index in cut:
                content = self._contents[index][: cut[index].end]
                words[index] = [m.start() for m in _WORD_START.finditer(content, cut[index].start)]
                inserts.append([*((word, _WORD) for word in words[index]), (cut[index].end, 2 * index + 1)])
            else:
                inserts.append([] if span is None else [(span.start, 2 * index), (span.end, 2 * index + 1)])
        regions: dict[int, _Region | None] = {}
        kept: list[int] = []
        previous = 0
        for mark in self._probe(inserts) or []:
            if mark.number == _WORD:
                kept.append(mark.position)
                continue
            index = mark.number // 2
            if index in cut:
                regions[index] = self._rest(
                    index, cut[index], words[index], kept, Span(previous, mark.position)
                )
            kept, previous = [], mark.position
        return regions

    def _rest(self, index: int, span: Span, words: list[int], kept: list[int], where: Span) -> _Region | None:
        """The part of a message from the first word that was kept."""
        if len(kept) > len(words):
            return None
        content = self._contents[index]
        first, begin = (words[-len(kept)], kept[0]) if kept else (span.end, where.end)
        before = self._rendered[where.start : begin]
        dropped = words[-len(kept) - 1] + 1 if len(kept) < len(words) else span.start
        if len(kept) == len(words):  # Every word is there: so may be what stands before the first of them.
            lead, bare = content[span.start : first].strip(), before.rstrip()
            if lead and bare.endswith(lead):
                return _Region(where.start + len(bare) - len(lead), where.end, *span)
        for match in _INNER_START.finditer(content, dropped, first):
            if before.endswith(content[match.start() : first]):
                return _Region(begin - (first - match.start()), where.end, match.start(), span.end)
        return _Region(begin, where.end, first, span.end)

    def _with_white_space(self, regions: list[_Region | None]) -> list[_Region | None]:
        """Widen the regions by the white space beside their texts that the template kept.

        That is by how much less stands between two texts when they do not have this white space.
        """
        beside = [
            (0, 0) if region is None else _white_space_beside(content, region)
            for region, content in zip(regions, self._contents, strict=True)
        ]
        if not any(map(any, beside)):
            return regions
        gaps = self._gaps(regions, [(0, 0)] * len(beside))
        leading = self._gaps(regions, [(before, 0) for before, _ in beside])
        trailing = self._gaps(regions, [(0, after) for _, after in beside])
        numbers = [number for number, _ in gaps]
        if [number for number, _ in leading] != numbers or [number for number, _ in trailing] != numbers:
            return regions
        widened = list(regions)
        for place, number in enumerate(numbers[:-1]):
            region, content = widened[number // 2], self._contents[number // 2]
            if region is None:
                continue
            if number % 2 == 0:
                before, after = gaps[place][1] - leading[place][1], 0
            else:
                before, after = 0, gaps[place + 1][1] - trailing[place + 1][1]
            wide = _Region(
                region.start - before, region.end + after, region.first - before, region.last + after
            )
            if self._says(
                wide.start, region.start, content[max(wide.first, 0) : region.first]
            ) and self._says(region.end, wide.end, content[region.last : wide.last]):
                widened[number // 2] = wide
        return widened

    def _gaps(
        self, regions: Sequence[_Region | None], cut: Sequence[tuple[int, int]]
    ) -> list[tuple[int, int]]:
        """Each mark and how much stands before it, when so much is cut off before and after each text."""
        contents = list(self._contents)
        for index, (region, (before, after)) in enumerate(zip(regions, cut, strict=True)):
            if region is not None:
                content = contents[index]
                opening, closing = chr(self._plane + 2 * index), chr(self._plane + 2 * index + 1)
                text = f"{opening}{content[region.first : region.last]}{closing}"
                contents[index] = content[: region.first - before] + text + content[region.last + after :]
        rendered = self._rendering(contents) or ""
        numbers = [ord(mark) - self._plane for mark in self._marks.findall(rendered)]
        sizes = map(len, self._marks.split(rendered))
        return list(zip([*numbers, -1], sizes, strict=True))

    def _says(self, start: int, end: int, text: str) -> bool:
        return 0 <= start <= end and self._rendered[start:end] == text

    def _ended(self, cores: Sequence[Span]) -> list[_Region | None] | None:
        """Mark the ends only: for templates that look at how a text starts."""
        marks = self._probe([[(core.end, 2 * index + 1)] for index, core in enumerate(cores)])
        if marks is None:
            return None
        regions: list[_Region | None] = [None] * len(cores)
        previous = 0
        for mark in marks:
            index = mark.number // 2
            text = self._contents[index][slice(*cores[index])]
            if self._rendered.endswith(text, previous, mark.position):
                regions[index] = _Region(mark.position - len(text), mark.position, *cores[index])
            previous = mark.position
        return regions

    def _substituted(self, ranges: Sequence[Span]) -> list[_Region | None] | None:
        """Put as many marks in the place of each text: for templates that look at the length."""
        text = self._rendering(self._without_texts(ranges))
        if text is None or len(text) != len(self._rendered):
            return None
        runs = [
            (ord(m[1]) - self._plane, *m.span()) for m in re.finditer(f"({self._marks.pattern})\\1*", text)
        ]
        if not self._same_outside(text, runs):
            return None
        regions: list[_Region | None] = [None] * len(ranges)
        for index, start, end in runs:
            if end - start == ranges[index].end - ranges[index].start:
                regions[index] = _Region(start, end, *ranges[index])
        return regions

    def _searched(self, cores: Sequence[Span]) -> list[_Region | None]:
        text = self._rendering(self._without_texts(cores))
        if text is None:
            return [None] * len(cores)
        return _unique(self._rendered, self._contents, scaffold=text)

    def _without_texts(self, ranges: Sequence[Span]) -> list[str]:
        return [
            content[:start] + chr(self._plane + index) * (end - start) + content[end:]
            for index, (content, (start, end)) in enumerate(zip(self._contents, ranges, strict=True))
        ]

    def _same_outside(self, text: str, runs: Sequence[tuple[int, int, int]]) -> bool:
        last = 0
        for _, start, end in runs:
            if text[last:start] != self._rendered[last:start]:
                return False
            last = end
        return text[last:] == self._rendered[last:]


def _in_region(rendered: str, region: _Region | None, blocks: Sequence[str]) -> list[Span | None] | None:
    """The blocks of a message by their places in it; None when the template changed the text."""
    if region is None:
        return None
    content, text = "".join(blocks), rendered[region.start : region.end]
    if content.startswith(text, region.first):
        return _by_offset(region, blocks)
    return _by_characters(text, region.start, content, blocks)


def _by_offset(region: _Region, blocks: Sequence[str]) -> list[Span | None]:
    """A blank block is empty where it was trimmed; one whose words were dropped is nowhere.

    Of a message with nothing left the last block is empty, for what follows it is still the end of a turn.
    """
    spans: list[Span | None] = []
    stop = region.first + region.end - region.start
    offset = 0
    for block in blocks:
        start, end = (min(max(place, region.first), stop) for place in (offset, offset + len(block)))
        shift = region.start - region.first
        spans.append(Span(start + shift, end + shift) if start < end or not block.strip() else None)
        offset += len(block)
    return [*spans[:-1], spans[-1] or Span(region.end, region.end)]


def _by_characters(text: str, start: int, content: str, blocks: Sequence[str]) -> list[Span | None] | None:
    """By the characters that are not white space, when those are the end of the message, unchanged."""
    places = [start + place for place, character in enumerate(text) if not character.isspace()]
    bare = "".join(content.split())
    dropped = len(bare) - len(places)
    if not places or dropped < 0 or bare[dropped:] != "".join(text.split()):
        return None
    bounds = [*places, places[-1] + 1]
    spans: list[Span | None] = []
    count = -dropped
    for block in blocks:
        first, count = count, count + len("".join(block.split()))
        if count == first or count > 0:
            spans.append(Span(bounds[max(first, 0)], bounds[max(count, 0)]))
        else:
            spans.append(None)
    return spans


def _searched(rendered: str, region: _Region, blocks: Sequence[str]) -> list[Span | None]:
    text = rendered[region.start : region.end]
    found = _unique(text, blocks, scaffold="")
    return [span and Span(span.start + region.start, span.end + region.start) for span in found]


def _unique(text: str, contents: Sequence[str], *, scaffold: str) -> list[_Region | None]:
    """Find contents that are in the text as often as asked for, and in no other content or scaffold."""
    cores = [content.strip() for content in contents]
    places: dict[str, list[int]] = {}
    for core, wanted in Counter(cores).items():
        found = [match.start() for match in re.finditer(f"(?={re.escape(core)})", text)] if core else []
        elsewhere = core in scaffold or any(core in other for other in cores if other != core)
        places[core] = found if len(found) == wanted and not elsewhere else []
    regions: list[_Region | None] = []
    for content, core in zip(contents, cores, strict=True):
        start = places[core].pop(0) if places[core] else None
        regions.append(None if start is None else _Region(start, start + len(core), *_core(content)))
    return regions


def _core(text: str) -> Span:
    """The range of a text without its outer white space."""
    core = text.strip()
    start = len(text) - len(text.lstrip()) if core else 0
    return Span(start, start + len(core))


def _white_space_beside(text: str, region: _Region) -> tuple[int, int]:
    before, after = text[: region.first], text[region.last :]
    return len(before) - len(before.rstrip()), len(after) - len(after.lstrip())
