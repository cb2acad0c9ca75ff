"""What the log of a replica may not keep: its own secrets, in the spellings that programs print by themselves."""

import base64
import json
from urllib.parse import quote, quote_plus

import pytest

from serving_service.shim.masking import MASK, Masker

SECRET = "sk-Zm9+/? é#0123"


@pytest.mark.parametrize(
    "spelling",
    [
        SECRET,
        repr({"KEY": SECRET}),
        json.dumps(SECRET),
        json.dumps(SECRET, ensure_ascii=False),
        quote(SECRET),
        quote(SECRET, safe=""),
        quote_plus(SECRET),
    ],
)
def test_a_secret_is_masked_however_it_is_written(spelling: str) -> None:
    masked = Masker([SECRET]).mask(f"before {spelling} after".encode())
    assert MASK in masked
    assert masked.startswith(b"before ")
    assert masked.endswith(b" after")
    assert b"0123" not in masked


@pytest.mark.parametrize("secret", ['{"key": "one\\n0123"}', 'it\'s "quoted" 0123', "back\\slash and 'quotes'\n0123"])
@pytest.mark.parametrize("around", ["", "'", '"', "'\""])
def test_a_secret_is_masked_as_python_shows_it(secret: str, around: str) -> None:
    """A printed `os.environ` is the commonest way for a secret into a log."""
    masked = Masker([secret]).mask(repr({"KEY": f"{around}{secret}{around}"}).encode())
    assert MASK in masked
    assert b"0123" not in masked


@pytest.mark.parametrize("before", ["", "u", "us", "use", "user:"])
@pytest.mark.parametrize("after", ["", "x", "xy"])
@pytest.mark.parametrize("encode", [base64.b64encode, base64.urlsafe_b64encode])
def test_a_secret_inside_base64_is_masked_wherever_it_begins(before: str, after: str, encode: object) -> None:
    assert callable(encode)
    text: bytes = encode(f"{before}{SECRET}{after}".encode())
    masked = Masker([SECRET]).mask(text)
    assert MASK in masked
    # At its edges a secret shares a character with its neighbours; no more than these may stay.
    assert len(masked.replace(MASK, b"")) <= len(encode(before.encode())) + len(encode(after.encode())) + 4


def test_each_line_of_a_value_with_several_lines_is_masked() -> None:
    key = "-----BEGIN KEY-----\r\nMIIEvQIBADANBg\nshort\n-----END KEY-----\n"
    masker = Masker([key])
    assert masker.mask(b"MIIEvQIBADANBg") == MASK
    assert masker.mask(b"a -----END KEY----- b") == b"a " + MASK + b" b"
    assert masker.mask(b"short") == b"short"


def test_values_that_overlap_leave_no_rest_of_either() -> None:
    assert Masker(["abcdefgh", "efghijkl"]).mask(b"1abcdefghijkl2") == b"1" + MASK + b"2"
    assert Masker(["aaaaaaaa"]).mask(b"a" * 12) == MASK


def test_a_value_below_eight_bytes_is_left_alone() -> None:
    assert Masker(["1234567", ""]).mask(b"1234567") == b"1234567"
    assert Masker(["12345678"]).mask(b"12345678") == MASK


def test_text_behind_the_limit_never_moves_into_it() -> None:
    masker = Masker(["long-secret-value"])
    text = b"long-secret-value" * 2 + b"long-secret"
    assert masker.mask(text, limit=20) == MASK
    assert masker.mask(b"0123456789 long-secret-value", limit=5) == b"01234"
    assert masker.mask(b"0123456789long-secret-value", limit=12) == b"0123456789" + MASK
