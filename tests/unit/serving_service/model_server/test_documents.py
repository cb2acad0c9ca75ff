"""JSON that is read and written as the standard library would, whichever of the two does it."""

import datetime
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving_service.model_server import documents

_scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.sampled_from([2**63, 2**64, -(2**63) - 1, 10**18, -0.0])
    | st.floats()
    | st.text(st.characters(exclude_categories=[]), max_size=5)
)
_values = st.recursive(
    _scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=12,
)


def write(value: Any) -> bytes:
    return documents.write(value, simpler=_simpler, otherwise=lambda value: json.dumps(value, default=_simpler))


def _simpler(value: Any) -> Any:
    if isinstance(value, datetime.date):
        return f"the day {value.isoformat()}"
    raise TypeError("no such thing in JSON")


@given(_values, st.booleans())
def test_a_text_is_read_as_the_standard_library_reads_it(value: Any, is_ascii: bool) -> None:
    text = json.dumps(value, ensure_ascii=is_ascii).encode("utf-8", "surrogatepass")
    try:
        expected = repr(json.loads(text))
    except UnicodeDecodeError:
        with pytest.raises(UnicodeDecodeError):
            documents.read(text)
    else:
        assert repr(documents.read(text)) == expected


@given(_values)
def test_a_value_is_written_so_that_it_can_be_read_again(value: Any) -> None:
    assert repr(json.loads(write(value))) == repr(json.loads(json.dumps(value)))


@pytest.mark.parametrize("text", [b"", b"{", b"[1,]", b"'a'", b"[1] 2", b"\xff", b'"\n"', b"nul"])
def test_what_is_no_json_is_an_error(text: bytes) -> None:
    with pytest.raises(ValueError, match=r".+"):
        documents.read(text)


@pytest.mark.parametrize("text", [b"\xef\xbb\xbf[1]", "[1]".encode("utf-16")])
def test_what_orjson_refuses_is_left_to_the_standard_library(text: bytes) -> None:
    assert repr(documents.read(text)) == repr(json.loads(text))


def test_not_a_number_is_not_written_as_null() -> None:
    assert write([math.nan, math.inf, None]) == b"[NaN, Infinity, null]"


def test_what_json_does_not_know_is_asked_for_and_dates_are_no_exception() -> None:
    assert write({"a": datetime.date(2026, 1, 2)}) == b'{"a":"the day 2026-01-02"}'
    with pytest.raises(TypeError, match="no such thing"):
        write([object()])


def test_without_orjson_all_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "orjson", None)
    assert documents.read(b'{"a": [1.5]}') == {"a": [1.5]}
    assert json.loads(write({"a": [1.5]})) == {"a": [1.5]}
