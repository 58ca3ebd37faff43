"""Files as damage, other programs and enemies leave them."""

import copy
import json
from typing import Any

from hypothesis import strategies as st

#: Values that a field may hold instead of its own.
HOSTILE = (
    *(None, True, False, -1, 0, 1, 2**31, 2**63, 10**40, -1.5, 1e308, float("nan"), float("inf")),
    *("", "x", "-1", "../../etc/passwd", "/etc/passwd", "\x00", "\ud800", "é" * 99),
    *([], {}, [None], [[[]]], {"": 0}, {"__class__": "os.system"}),
)
#: Bytes that mean something to one of the parsers.
FRAGMENTS = (
    *(b"", b"\x00", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\x80", b"\xed\xa0\x80", b"\n"),
    *(b'"', b"{", b"}", b"[", b"]", b",", b":", b"\\u", b"\\ud800", b"NaN", b"1e999", b"null"),
    *(b"PAR1", b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"[" * 3000, b'{"a":' * 3000, b"9" * 5000),
)


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """`data` with pieces cut out, overwritten, repeated or put in."""
    for _ in range(draw(st.integers(1, 4))):
        begin = draw(st.integers(0, len(data)))
        kind = draw(st.sampled_from(("flip", "cut", "truncate", "insert", "repeat")))
        if kind == "flip":
            piece = draw(st.binary(min_size=1, max_size=4))
            data = data[:begin] + piece + data[begin + len(piece) :]
        elif kind == "cut":
            data = data[:begin] + data[begin + draw(st.integers(1, 40)) :]
        elif kind == "truncate":
            data = data[:begin]
        elif kind == "insert":
            data = data[:begin] + draw(st.sampled_from(FRAGMENTS)) + data[begin:]
        else:
            end = begin + draw(st.integers(1, 200))
            data = data[:end] + data[begin:end] * draw(st.integers(1, 5)) + data[end:]
    return data


@st.composite
def replaced(draw: st.DrawFn, value: Any) -> Any:
    """JSON in which some values, keys and items are others or are missing."""
    root = {"": copy.deepcopy(value)}
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(root))
        container, key = places[draw(st.integers(0, len(places) - 1))]
        if draw(st.booleans()) or container is root:
            container[key] = copy.deepcopy(draw(st.sampled_from(HOSTILE)))
        elif isinstance(container, dict) and draw(st.booleans()):
            container["other"] = container.pop(key)
        else:
            del container[key]
    return root[""]


def _places(value: Any):
    """Every place of a value within the JSON: its container and its key there."""
    keys = value if isinstance(value, dict) else range(len(value))
    for key in list(keys):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _places(value[key])


def damaged_json(value: Any) -> st.SearchStrategy[bytes]:
    """A JSON file damaged as bytes, or well-formed with other values in it."""
    text = json.dumps(value, indent=1).encode()
    return st.one_of(damaged(text), replaced(value).map(lambda other: json.dumps(other).encode()))
