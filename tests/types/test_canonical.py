from __future__ import annotations

import datetime
import enum
import json
import math
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openweights_prefect.errors import InvalidParameterError
from openweights_prefect.types.canonical import canonical_json, decode_event, encode_event

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=8)
KEYS = TEXT | st.sampled_from(["$float", "$$float", "$$$float"])


def json_values(*, allow_nan: bool) -> st.SearchStrategy[Any]:
    names = st.sampled_from(["NaN", "Infinity", "-Infinity"])
    leaves = (
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=allow_nan, allow_infinity=allow_nan)
    )
    return st.recursive(
        leaves | TEXT | names,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
        max_leaves=20,
    )


def shuffled(value: Any, rng: random.Random) -> Any:
    if isinstance(value, dict):
        items = [(key, shuffled(item, rng)) for key, item in value.items()]
        rng.shuffle(items)
        return dict(items)
    return [shuffled(item, rng) for item in value] if isinstance(value, list) else value


def same(value: Any, read: Any) -> bool:
    """Equal, where a float without a fraction may have become an integer."""
    if isinstance(value, dict):
        return value.keys() == read.keys() and all(same(value[key], read[key]) for key in value)
    if isinstance(value, list):
        return len(value) == len(read) and all(map(same, value, read))
    return bool(value == (float(read) if isinstance(value, float) else read))


@given(json_values(allow_nan=False), st.integers())
def test_key_order_does_not_matter(value: Any, seed: int) -> None:
    """Shuffling every dict leaves the text as it was."""
    assert canonical_json(shuffled(value, random.Random(seed))) == canonical_json(value)


@given(json_values(allow_nan=False))
def test_text_is_the_value_in_ascii(value: Any) -> None:
    """The text parses back to an equal value, and writing that again changes nothing."""
    text = canonical_json(value)
    assert text.isascii()
    assert same(value, json.loads(text))
    assert canonical_json(json.loads(text)) == text


def test_text_is_compact_and_sorted() -> None:
    """The exact bytes are pinned, because job ids are made of them."""
    assert canonical_json({"b": [1, 2.5, None, True], "a": "é"}) == '{"a":"\\u00e9","b":[1,2.5,null,true]}'


@pytest.mark.parametrize(
    ("left", "right", "same"),
    [
        (1, 1.0, True),
        (-0.0, 0, True),
        (1e22, 10**22, True),
        (5.089247803524763e16, 50892478035247630, True),
        ((1,), [1], True),
        (True, 1, False),
        ("1", 1, False),
    ],
)
def test_equal_numbers_are_written_alike(left: object, right: object, same: bool) -> None:
    """A form in a browser sends `1` for 1.0; booleans and strings stay what they are."""
    assert (canonical_json({"x": left}) == canonical_json({"x": right})) is same


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ({"a": [0, {"b": math.nan}]}, r"job\.a\[1\]\.b is nan"),
        ({"a": -math.inf}, r"job\.a is -inf"),
        ({"a": {1: 2}}, r"job\.a has the key 1,"),
        ({"a": {1, 2}}, r"job\.a is \{1, 2\} of type set"),
        ({"a": Path("x")}, r"job\.a is .* of type PosixPath"),
        ({"a": "x\x00"}, r"job\.a is 'x\\x00'"),
        ({"\ud800": 1}, r"a key of job is"),
        ({"a": 10**5000}, r"job\.a is an integer"),
    ],
)
def test_refusal_names_the_path(value: object, path: str) -> None:
    """What JSON or PostgreSQL cannot hold is an error that says where it is."""
    with pytest.raises(InvalidParameterError, match=path):
        canonical_json(value, name="job")


def test_endless_nesting_is_refused() -> None:
    """A list that holds itself is an error, not a crash."""
    endless: list[object] = []
    endless.append(endless)
    with pytest.raises(InvalidParameterError, match="nested deeper"):
        canonical_json(endless)
    assert "nested deeper" in json.dumps(encode_event({"a": endless}))


@given(st.dictionaries(KEYS, json_values(allow_nan=True), max_size=4))
def test_events_survive_the_transport(data: dict[str, Any]) -> None:
    """Every JSON value, NaN and look-alikes of our marker included, comes back as it was."""
    wire = json.dumps(encode_event(data), allow_nan=False)
    assert repr(decode_event(json.loads(wire))) == repr(data)


def test_non_finite_numbers_have_names_on_the_wire() -> None:
    """Readers that do not decode can still tell what a number was."""
    encoded = encode_event({"loss": math.nan, "norm": [math.inf, -math.inf]})
    assert encoded == {"loss": {"$float": "NaN"}, "norm": [{"$float": "Infinity"}, {"$float": "-Infinity"}]}


def test_text_that_postgresql_refuses_is_mended() -> None:
    """U+0000 and lone surrogates become U+FFFD, in keys too."""
    assert encode_event({"a\x00": "x\ud800y\x00"}) == {"a\ufffd": "x\ufffdy\ufffd"}


class Colour(enum.StrEnum):
    RED = "red"


class Broken:
    def item(self) -> None:
        raise RuntimeError

    def __str__(self) -> str:
        raise RuntimeError


def test_foreign_types_become_json() -> None:
    """Whatever a training script logs is stored in some form."""
    numpy = pytest.importorskip("numpy")
    when = datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC)
    data = {
        "scalar": numpy.float32("nan"), "double": numpy.float64(0.5), "count": numpy.int64(3),
        "flag": numpy.bool_(True),
        "array": numpy.array([[1, 2]]), "when": when, "path": Path("a/b"), "enum": Colour.RED, "set": {1},
        "broken": Broken(), "big": 1 << 20000, 7: 1,
    }  # fmt: skip
    encoded = encode_event(data)  # type: ignore[arg-type]  # A key that is not a string is the point.
    assert json.loads(json.dumps(encoded, allow_nan=False)) == encoded
    assert encoded == {
        "scalar": {"$float": "NaN"}, "double": 0.5, "count": 3, "flag": True, "array": [[1, 2]],
        "when": "2026-01-02 00:00:00+00:00", "path": "a/b", "enum": "red", "set": [1],
        "broken": "<Broken>", "big": hex(1 << 20000), "7": 1,
    }  # fmt: skip


def test_event_data_must_be_a_dict() -> None:
    """Logging a bare string is a mistake that the caller hears of."""
    with pytest.raises(InvalidParameterError, match="not a dict"):
        encode_event("loss")  # type: ignore[arg-type]


def test_only_the_standard_library_is_imported() -> None:
    """Jobs import these modules in environments that hold nothing else of ours."""
    code = (
        "import sys; import openweights_prefect.types.identity, openweights_prefect.files.store,"
        " openweights_prefect.files.validation;"
        "foreign = ('pydantic', 'numpy', 'prefect', 'pathspec', 'httpx');"
        "print([name for name in sys.modules if name.split('.')[0] in foreign])"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"
