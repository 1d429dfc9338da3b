"""JSON as its standard has it, read in bounded time and memory.

`json.loads` accepts more than JSON (NaN, a name that stands twice in an object) and fails in more
ways than one: RecursionError for deep nesting, ValueError for integers of thousands of digits, and
later OverflowError, where an infinite number becomes an integer. Files come from strangers, so all
of that is one class of error here.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

from MaxDraft.errors import UserError

MAX_BYTES = 64 << 20  # a tokenizer.json or the index of a large mixture of experts has up to 30 MB
MAX_DIGITS = 64  # Hugging Face writes 1e30 as an integer ("model_max_length"); float() takes 300
MAX_DEPTH = 64
# Half of a surrogate pair alone is no text: it cannot be written to a file or a terminal.
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class JsonError(UserError):
    """Text that is not JSON, or more of it than is read."""


def parse_json(raw: bytes, *, max_bytes: int = MAX_BYTES, nan: bool = False) -> Any:
    """The JSON value that UTF-8 bytes hold.

    nan: accept NaN and Infinity, which Python's own writer leaves in config.json files.
    JsonError, whose text is to follow the name of the file, for everything that is wrong.
    """
    if len(raw) > max_bytes:
        raise JsonError(f"more than the {max_bytes:,} bytes that are read")
    try:
        value = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_number,
            parse_constant=None if nan else _constant,
        )
    except RecursionError:
        raise JsonError("arrays and objects are nested too deeply") from None
    except UnicodeDecodeError as error:
        raise JsonError(f"not UTF-8: {error.reason} at byte {error.start:,}") from None
    except json.JSONDecodeError as error:
        raise JsonError(str(error)) from None
    _check_depth(value)
    if _SURROGATE.search(raw):
        _check_surrogates(value)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise JsonError(f"the name {name[:80]!r} stands twice in one object")
            seen.add(name)
    return value


def _integer(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise JsonError(f"an integer of {len(text):,} digits, {text[:8]}...")
    return int(text)


def _number(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise JsonError(f"the number {text[:80]} is larger than a float64 can be")
    return value


def _constant(text: str) -> float:
    raise JsonError(f"{text} is not JSON")


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        inner = (
            item.values() if isinstance(item, dict) else item
            for item in level
            if isinstance(item, dict | list)
        )
        level = [item for items in inner for item in items]
        if not level:
            return
    raise JsonError(f"arrays and objects are nested more than {MAX_DEPTH} deep")


def _check_surrogates(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise JsonError("half of a surrogate pair (\\ud800 to \\udfff) stands alone") from None
