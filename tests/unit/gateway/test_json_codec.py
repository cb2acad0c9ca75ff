"""The JSON dialect: what is read, what is refused and with which words, what is written."""

from __future__ import annotations

import base64
import json
import traceback
from typing import Any

import orjson
import pytest
from google.protobuf import struct_pb2
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st

from gateway.json_codec import MAX_DEPTH, MOST_CONTAINERS, Codec, CodecError, codec_for, parse
from tessera.identity.v1 import identity_pb2
from tests.support.descriptors import ProtoFile, message_type

CANARY = "canary-5e1f"


@pytest.fixture(scope="module")
def everything() -> Codec:
    return codec_for(message_type("Everything"))


def read(codec: Codec, text: str) -> Message:
    return codec.decode(parse(text.encode()))


def refused(codec: Codec, body: Any) -> CodecError:
    with pytest.raises(CodecError) as caught:
        codec.decode(body)
    return caught.value


# What is read


@pytest.mark.parametrize(
    ("body", "field", "expected"),
    [
        ('{"flag": "true"}', "flag", True),
        ('{"flag": "FALSE"}', "flag", False),
        ('{"flag": true}', "flag", True),
        ('{"version": 1}', "version", "1"),
        ('{"version": "1"}', "version", "1"),
        ('{"version": 1.5}', "version", "1.5"),
        ('{"big": "90"}', "big", 90),
        ('{"big": "-007"}', "big", -7),
        ('{"big": 1.0}', "big", 1),
        ('{"big": 9007199254740993}', "big", 2**53 + 1),
        ('{"big": -9223372036854775808}', "big", -(2**63)),
        ('{"huge": 18446744073709551615}', "huge", 2**64 - 1),
        ('{"ratio": 1}', "ratio", 1.0),
        ('{"ratio": "2.5e-1"}', "ratio", 0.25),
        ('{"color": "dark_Green"}', "color", 2),
        ('{"colors": ["RED", "red"]}', "colors", [1, 1]),
        ('{"blob": "/+8="}', "blob", b"\xff\xef"),
        ('{"name": "a\\u0000b"}', "name", "a\x00b"),
        ('{"name": "gr\\u00fcn"}', "name", "grün"),
        ('{"name": null}', "name", ""),
        ('{"unknown": {"deep": [1]}, "name": "x"}', "name", "x"),
        ('{"counts": ["1", 2]}', "counts", [1, 2]),
        ('{"variables": {"A": 1, "B": true, "C": "x"}}', "variables", {"A": "1", "B": "true", "C": "x"}),
        ('{"marks": {"7": "true"}}', "marks", {7: True}),
        ('{"model_version": 3}', "version", "3"),
        ('{"version": "3", "release": 3}', "version", "3"),
        ('{"name": "first", "name": "last"}', "name", "last"),
    ],
)
def test_lenient_input_is_read(everything: Codec, body: str, field: str, expected: object) -> None:
    value = getattr(read(everything, body), field)
    assert (dict(value) if isinstance(expected, dict) else value) == expected


def test_messages_are_read_inside_lists_maps_and_themselves(everything: Codec) -> None:
    body = {
        "old_entities": [{"title": "a", "count": "2"}, {}],
        "items": {"k": {"title": "b"}},
        "child": {"child": {"name": "deep"}},
    }
    message: Any = everything.decode(body)
    assert [(item.title, item.count) for item in message.entities] == [("a", 2), ("", 0)]
    assert message.items["k"].title == "b"
    assert message.child.child.name == "deep"


def test_optional_fields_keep_presence_both_ways(everything: Codec) -> None:
    assert everything.encode(everything.decode({"note": "", "choice_made": False})) == {
        "note": "",
        "choice_made": False,
    }
    assert everything.encode(everything.decode({"note": None})) == {}


def test_free_json_passes_unchanged(everything: Codec) -> None:
    body = {
        "free": {"a": None, "b": [1, 2.5, True, "x", {}], "c": {"d": []}},
        "any": [None, {"z": 1}],
        "list": [1, [2]],
    }
    message: Any = everything.decode(body)
    assert isinstance(message.free, struct_pb2.Struct)
    assert everything.encode(message) == body
    assert b'"b":[1,2.5,' in orjson.dumps(everything.encode(message)), "whole numbers stay whole"


def test_null_is_a_value_only_for_a_value_field(everything: Codec) -> None:
    assert everything.encode(everything.decode({"any": None, "free": None, "item": None})) == {"any": None}


def test_explicit_json_names_are_read_and_written() -> None:
    person = codec_for(message_type("Person"))
    body = {"userName": "a", "$ref": "Groups/1", "home_town": "x", "friends": [{"userName": "b"}]}
    assert person.encode(person.decode(body)) == body
    assert person.decode({"homeTown": "x"}) == person.decode({}), "a derived json_name is no name here"
    assert person.decode({"user_name": "a"}) == person.decode({"userName": "a"})


# What is refused


@pytest.mark.parametrize(
    ("body", "message", "malformed"),
    [
        ({"flag": []}, "flag: expected true or false, got a list", False),
        ({"flag": 1}, "flag: expected true or false, got a number", False),
        ({"flag": "yes"}, "flag: expected true or false, got a string", False),
        ({"big": True}, "big: expected an integer, got a boolean", False),
        ({"big": " 5_0 "}, "big: expected an integer, got a string", False),
        ({"big": "+1"}, "big: expected an integer, got a string", False),
        ({"big": "٣"}, "big: expected an integer, got a string", False),
        ({"big": "9" * 5000}, "big: expected an integer, got a string", False),
        ({"big": 1.5}, "big: expected an integer, got a fraction or a number beyond 64 bits", False),
        ({"big": -9.223372036854776e18}, "big: expected an integer, got a fraction or a number beyond 64 bits", False),
        ({"big": float("inf")}, "big: expected an integer, got a fraction or a number beyond 64 bits", False),
        ({"small": 2**31}, "small: expected an integer from -2147483648 to 2147483647, got one outside of it", False),
        ({"natural": -1}, "natural: expected an integer from 0 to 4294967295, got one outside of it", False),
        ({"ratio": float("nan")}, "ratio: expected a finite number that fits the field", False),
        ({"ratio": float("-inf")}, "ratio: expected a finite number that fits the field", False),
        ({"ratio": 10**400}, "ratio: expected a finite number that fits the field", False),
        ({"ratio": "1e400"}, "ratio: expected a finite number that fits the field", False),
        ({"single": 1e39}, "single: expected a finite number that fits the field", False),
        ({"ratio": "nan"}, "ratio: expected a number, got a string that is none", False),
        ({"ratio": True}, "ratio: expected a number, got a boolean", False),
        ({"name": True}, "name: expected text, got a boolean", False),
        ({"name": {}}, "name: expected text, got an object", False),
        ({"name": 1e300}, "name: expected text, got a number too large to keep its digits; put it in quotes", False),
        ({"name": "\ud800"}, "name: expected text, got a string with half a surrogate pair", False),
        ({"color": "BLUE"}, "color: expected one of RED, DARK_GREEN, got another string", False),
        ({"color": "COLOR_UNSPECIFIED"}, "color: expected one of RED, DARK_GREEN, got another string", False),
        ({"color": 1}, "color: expected one of RED, DARK_GREEN, got a number", False),
        ({"words": "a"}, "words: expected a list, got a string", False),
        ({"words": ["a", None]}, "words[1]: expected text, got null", False),
        ({"variables": {"A": None}}, 'variables["A"]: expected text, got null', False),
        ({"variables": {"A": [CANARY]}}, 'variables["A"]: expected text, got a list', False),
        ({"variables": [CANARY]}, "variables: expected an object, got a list", False),
        ({"variables": {"x" * 100: []}}, f'variables["{"x" * 64}..."]: expected text, got a list', False),
        (
            {"variables": {"a\nb\ud800": "x"}},
            'variables["a\\nb\\ud800"]: expected text, got a string with half a',
            False,
        ),
        ({"item": [CANARY]}, "item: expected an object, got a list", False),
        ({"child": {"old_entities": [{}, {"count": "x"}]}}, "child.old_entities[1].count: expected an integer", False),
        ({"free": {"a": [float("nan")]}}, 'free["a"][0]: expected a finite number', False),
        ({"blob": "%%%"}, "blob: expected base64 in the standard alphabet, with padding", True),
        ({"blob": "_-8="}, "blob: expected base64 in the standard alphabet, with padding", True),
        ({"blob": "YQ"}, "blob: expected base64 in the standard alphabet, with padding", True),
        ({"blob": "YQ==YQ=="}, "blob: expected base64 in the standard alphabet, with padding", True),
        ({"blob": "é"}, "blob: expected base64 in the standard alphabet, with padding", True),
        ({"blob": 5}, "blob: expected text in base64, got a number", False),
        (
            {"text_value": "", "bytes_value": "YQ=="},
            "text_value and bytes_value exclude each other; give one of them",
            True,
        ),
        (
            {"version": "1", "release": "2"},
            "release, version are names of one field; give one of them",
            False,
        ),
    ],
)
def test_bad_value_is_refused_with_its_path(everything: Codec, body: Any, message: str, malformed: bool) -> None:
    error = refused(everything, body)
    assert str(error).startswith(message)
    assert error.malformed is malformed
    assert orjson.dumps(str(error))


def test_null_member_of_a_oneof_does_not_count(everything: Codec) -> None:
    assert everything.encode(everything.decode({"text_value": None, "bytes_value": "YQ=="})) == {"bytes_value": "YQ=="}


@pytest.mark.parametrize(
    "body",
    [
        {"big": CANARY},
        {"flag": CANARY},
        {"color": CANARY},
        {"blob": CANARY},
        {"blob": CANARY + "é"},
        {"name": CANARY + "\ud800"},
        {"ratio": CANARY},
        {"item": CANARY},
        {"variables": {"A": [CANARY]}},
        {"version": CANARY, "release": "2"},
        {"text_value": CANARY, "bytes_value": ""},
    ],
)
def test_refused_value_appears_nowhere_in_the_error(everything: Codec, body: Any) -> None:
    error = refused(everything, body)
    assert CANARY not in str(error) + repr(error)
    assert CANARY not in "".join(traceback.format_exception(error))
    assert error.__cause__ is None
    assert error.__context__ is None


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[1e400]",
        b'{"ratio": NaN}',
        b'{"ratio": 1e400}',
        b'{"name": "\\ud800"}',
        b'{"name": "\xff"}',
        b"\xef\xbb\xbf{}",
        b"{}{}",
        b"[" * 100_000,
        b"null",
        b"[]",
        b'"text"',
        b'{"name": ' + CANARY.encode() + b"}",
    ],
)
def test_text_that_is_no_json_object_is_malformed(text: bytes) -> None:
    with pytest.raises(CodecError) as caught:
        parse(text)
    assert caught.value.malformed
    assert caught.value.path == ""
    assert CANARY not in str(caught.value)
    assert caught.value.__context__ is None, "the parser's own exception holds the whole body"


def test_body_may_nest_to_the_limit_and_no_deeper() -> None:
    def nested(depth: int) -> bytes:
        return b'{"free":' * (depth - 1) + b"{}" + b"}" * (depth - 1)

    assert parse(nested(MAX_DEPTH))
    assert parse(nested(MAX_DEPTH)[:-1] + b',"list":[]}'), "more brackets than levels"
    with pytest.raises(CodecError, match=f"deeper than {MAX_DEPTH} levels"):
        parse(nested(MAX_DEPTH + 1))
    assert parse(b'{"words": ["%s"]}' % (b"[{" * 1000)), "brackets inside of strings do not nest"
    assert parse(b'{"list": [%s[]]}' % (b"[]," * 1000)), "many lists side by side are not deep"


def test_a_body_of_very_many_objects_and_lists_is_refused_before_it_is_read() -> None:
    assert parse(b'{"list":[%b]}' % b",".join([b"{}"] * (MOST_CONTAINERS - 2)))
    with pytest.raises(CodecError, match=f"more than {MOST_CONTAINERS} objects and lists"):
        parse(b'{"list":[%b]}' % b",".join([b"{}"] * (MOST_CONTAINERS - 1)))


def test_a_group_is_put_back_as_it_was_read_with_ten_thousand_members() -> None:
    members = [
        {"value": f"{number:016}", "display": f"user-{number}", "$ref": f"Users/{number:016}"}
        for number in range(10_000)
    ]
    codec = codec_for(identity_pb2.ReplaceGroupRequest.DESCRIPTOR)
    group = codec.decode(parse(json.dumps({"displayName": "all", "members": members}).encode()))
    assert group == identity_pb2.ReplaceGroupRequest(
        display_name="all",
        members=[
            identity_pb2.Member(value=each["value"], display=each["display"], ref=each["$ref"]) for each in members
        ],
    )


@pytest.mark.parametrize(
    "text", [b"[" * MOST_CONTAINERS * 2, rb"\"[" * MOST_CONTAINERS, rb"\\" + b"{" * MOST_CONTAINERS]
)
def test_brackets_in_a_text_are_no_objects_and_lists(text: bytes) -> None:
    assert parse(b'{"text":"%b"}' % text)


def test_descriptor_with_one_json_name_for_two_fields_is_refused() -> None:
    file = ProtoFile()
    file.message("Twins", "string first", "string second", second={"alias": ["first"]})
    twins = file.build().message_types_by_name["Twins"]
    for _ in range(2):
        with pytest.raises(ValueError, match=r"Twins: the JSON name first stands for both first and second"):
            codec_for(twins)


def test_type_without_a_spelling_is_refused() -> None:
    file = ProtoFile()
    file.message("Timed", "google.protobuf.Timestamp at")
    with pytest.raises(ValueError, match=r"google\.protobuf\.Timestamp has no spelling"):
        codec_for(file.build().message_types_by_name["Timed"])


# What is written


def test_output_is_strict_and_in_declared_order(everything: Codec) -> None:
    message: Any = everything.decode(
        {
            "version": 2,
            "variables": {"b": "2", "a": "1"},
            "color": "red",
            "big": "1700000000000",
            "blob": "YQ==",
            "marks": {"10": True, "9": False},
        }
    )
    assert json.dumps(everything.encode(message)) == (
        '{"big": 1700000000000, "blob": "YQ==", "color": "RED", "variables": {"a": "1", "b": "2"}, '
        '"marks": {"9": false, "10": true}, "version": "2"}'
    )


def test_default_values_are_written_only_where_the_proto_says_so() -> None:
    shown = codec_for(message_type("Shown"))
    assert shown.encode(shown.decode({})) == {"zero": False, "apples": [], "count": 0, "labels": {}}


def test_enum_number_that_is_not_known_is_written_as_text(everything: Codec) -> None:
    message: Any = everything.decode({})
    message.color = 77
    assert everything.encode(message) == {"color": "77"}


# Properties

_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
_int64 = st.integers(-(2**63), 2**63 - 1)
# Without minus zero: to protobuf it is no default value, to JSON it is zero.
_finite = st.floats(allow_nan=False, allow_infinity=False).map(lambda number: number + 0.0)
_flag = st.booleans() | st.sampled_from(["true", "FALSE"])
_color = st.sampled_from(["red", "RED", "Dark_Green"])
_free = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | _finite | _text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_text, inner, max_size=3),
    max_leaves=6,
)
_item = st.fixed_dictionaries({}, optional={"title": _text, "count": _int64})
_good = st.fixed_dictionaries(
    {},
    optional={
        "name": _text | _int64,
        "big": _int64 | _int64.map(str),
        "huge": st.integers(0, 2**64 - 1),
        "ratio": _finite | _finite.map(repr),
        "flag": _flag,
        "blob": st.binary(max_size=9).map(lambda data: base64.b64encode(data).decode()),
        "color": _color,
        "note": _text | st.none(),
        "words": st.lists(_text, max_size=3),
        "colors": st.lists(_color, max_size=3),
        "variables": st.dictionaries(_text, _text | _int64 | st.booleans(), max_size=3),
        "marks": st.dictionaries(_int64.map(str), _flag, max_size=3),
        "old_entities": st.lists(_item, max_size=2),
        "items": st.dictionaries(_text, _item, max_size=2),
        "free": st.dictionaries(_text, _free, max_size=3),
        "any": _free,
        "list": st.lists(_free, max_size=3),
        "child": st.fixed_dictionaries({}, optional={"item": _item, "text_value": _text}),
        "stray": _free,
    },
)
_anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8) | _color,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(), max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
_names = [name for field in message_type("Everything").fields for name in (field.name, "old_entities", "release")]


@given(_good)
def test_what_was_read_is_written_and_reads_back_the_same(body: dict[str, Any]) -> None:
    everything = codec_for(message_type("Everything"))
    message = everything.decode(body)
    written = everything.encode(message)
    again = everything.decode(parse(orjson.dumps(written)))
    assert again == message
    assert everything.encode(again) == written


@given(st.dictionaries(st.sampled_from(_names), _anything, max_size=4))
def test_any_json_is_read_or_refused_in_words_that_can_be_sent(body: dict[str, Any]) -> None:
    try:
        codec_for(message_type("Everything")).decode(body)
    except CodecError as error:
        orjson.dumps(str(error))
