"""Two encodings of JSON values: canonical text that is hashed, and event data that survives every transport.

Standard library only: jobs import it in environments that hold nothing else of ours.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any, TypeAlias

from openweights_prefect.errors import InvalidParameterError

JsonValue: TypeAlias = "dict[str, JsonValue] | list[JsonValue] | str | int | float | bool | None"

_MAX_DEPTH = 100
# PostgreSQL's jsonb refuses U+0000, and UTF-8 has no lone surrogates.
_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")
# CPython refuses to print integers of more than 4300 digits; this is well below.
_MAX_INTEGER_BITS = 8192

_FLOAT_KEY = "$float"
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_ESCAPABLE_KEY = re.compile(r"\$+float")


def canonical_json(value: object, *, name: str = "value") -> str:
    """Give equal values one text: sorted keys, no spaces, ASCII, whatever the order they were written in.

    Numbers that are equal are written alike: `1.0` as `1`, `-0.0` as `0`. Browsers and PostgreSQL do not keep
    the two apart, so a job submitted from a form must not get another id than the same job from Python.
    `True` stays apart from `1`. Lists and tuples are alike.

    Raises `InvalidParameterError` naming the path, which starts with `name`, of a value that JSON or
    PostgreSQL cannot hold: NaN, infinities, U+0000, lone surrogates, keys that are no strings, other types.
    """
    return json.dumps(_canonical(value, name, 0), sort_keys=True, separators=(",", ":"), allow_nan=False)


def encode_event(data: Mapping[str, object]) -> dict[str, JsonValue]:
    """Make event data safe for strict JSON and PostgreSQL; never fails on what is inside.

    Non-finite floats become `{"$float": "NaN"}` (or `Infinity`, `-Infinity`); U+0000 and lone surrogates
    become U+FFFD; array and tensor scalars their `item()`, arrays their `tolist()`; others their `str()`.
    A user's own `{"$float": ...}` is escaped, so that `decode_event` gives back every JSON value unchanged.
    """
    if not isinstance(data, Mapping):
        raise InvalidParameterError(
            f"Event data is {data!r:.80}, not a dict: log a dict of names and values."
        )
    return {_storable(_text(key)): _encoded(value, 1) for key, value in data.items()}


def decode_event(data: Mapping[str, Any]) -> dict[str, Any]:
    """Undo `encode_event`; data that was never encoded passes unchanged."""
    return {key: _decoded(value) for key, value in data.items()}


def _canonical(value: object, path: str, depth: int) -> JsonValue:
    if depth > _MAX_DEPTH:
        raise InvalidParameterError(f"{path[:80]}... is nested deeper than {_MAX_DEPTH} levels; flatten it.")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _canonical_text(value, path)
    if isinstance(value, int | float):
        return _canonical_number(value, path)
    if isinstance(value, Mapping):
        return _canonical_mapping(value, path, depth)
    if isinstance(value, list | tuple):
        return [_canonical(item, f"{path}[{index}]", depth + 1) for index, item in enumerate(value)]
    raise InvalidParameterError(
        f"{path} is {value!r:.80} of type {type(value).__name__}, which JSON cannot hold; "
        "use strings, numbers, booleans, None, lists and dicts."
    )


def _canonical_mapping(value: Mapping[Any, object], path: str, depth: int) -> dict[str, JsonValue]:
    result: dict[str, JsonValue] = {}
    for key, item in value.items():
        if not isinstance(key, str):
            raise InvalidParameterError(
                f"{path} has the key {key!r:.80}, which is not a string; write str(key)."
            )
        text = _canonical_text(key, f"a key of {path}")
        result[text] = _canonical(item, f"{path}.{text}", depth + 1)
    return result


def _canonical_text(value: str, path: str) -> str:
    if _UNSTORABLE.search(value):
        raise InvalidParameterError(
            f"{path} is {value!r:.80}, which holds U+0000 or a lone surrogate; "
            "the ledger cannot store that. Remove it."
        )
    return str.__str__(value)


def _canonical_number(value: float, path: str) -> int | float:
    if isinstance(value, float) and not math.isfinite(value):
        raise InvalidParameterError(
            f"{path} is {float(value)!r}, which JSON cannot hold; use a finite number or None."
        )
    if isinstance(value, float):
        # The digits that repr, browsers and PostgreSQL show: above 2**53 the exact integer has others.
        return int(Decimal(float.__repr__(value))) if value.is_integer() else float(value)
    if int(value).bit_length() > _MAX_INTEGER_BITS:
        raise InvalidParameterError(
            f"{path} is an integer of more than {_MAX_INTEGER_BITS} bits; pass it as a string."
        )
    return int(value)


def _encoded(value: object, depth: int) -> JsonValue:
    if depth > _MAX_DEPTH:
        return f"<nested deeper than {_MAX_DEPTH} levels>"
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _storable(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {_FLOAT_KEY: _float_name(value)}
    if isinstance(value, int):
        return int(value) if value.bit_length() <= _MAX_INTEGER_BITS else hex(value)
    if isinstance(value, Mapping):
        return _encoded_mapping(value.items(), depth)
    if isinstance(value, list | tuple | set | frozenset):
        return [_encoded(item, depth + 1) for item in value]
    return _encoded_foreign(value, depth)


def _encoded_mapping(items: Iterable[tuple[object, object]], depth: int) -> dict[str, JsonValue]:
    result = {_storable(_text(key)): _encoded(item, depth + 1) for key, item in items}
    if len(result) == 1:
        return {f"${key}" if _ESCAPABLE_KEY.fullmatch(key) else key: item for key, item in result.items()}
    return result


def _encoded_foreign(value: object, depth: int) -> JsonValue:
    """Arrays by duck typing: NumPy and torch are not imported here, and may not be there."""
    for method in ("item", "tolist"):
        convert = getattr(value, method, None)
        if not callable(convert):
            continue
        try:
            return _encoded(convert(), depth + 1)
        except Exception:  # An array of several values has no item(); a foreign object may do anything.
            continue
    return _storable(_text(value))


def _text(value: object) -> str:
    if isinstance(value, str):
        return value
    try:
        return str(value)
    except Exception:  # A broken __str__ must not lose the rest of the event.
        return f"<{type(value).__name__}>"


def _storable(text: str) -> str:
    return _UNSTORABLE.sub("\ufffd", str.__str__(text))


def _float_name(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    return "Infinity" if value > 0 else "-Infinity"


def _decoded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return _decoded_mapping(value)
    if isinstance(value, list | tuple):
        return [_decoded(item) for item in value]
    return value


def _decoded_mapping(value: Mapping[str, Any]) -> Any:
    if len(value) == 1:
        [(key, item)] = value.items()
        if key == _FLOAT_KEY and isinstance(item, str) and item in _NON_FINITE:
            return _NON_FINITE[item]
        if key != _FLOAT_KEY and _ESCAPABLE_KEY.fullmatch(key):
            return {key[1:]: _decoded(item)}
    return {key: _decoded(item) for key, item in value.items()}
