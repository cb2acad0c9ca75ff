"""The bodies that both servers are asked: written by hand, and made by chance that is always the same."""

import json
import random
from dataclasses import dataclass
from typing import Any

SIZE = 300
_JSON = "application/json"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One request."""

    body: bytes
    content_type: str | None = _JSON
    models: tuple[str, ...] = ()
    """The models that it is for; none when it is for all."""
    is_described: bool = False
    """Whether it is one that the description of the model says to be right."""


def cases(size: int = SIZE) -> list[Case]:
    """`size` of them for every model, those by hand first, and some for some models."""
    generator = random.Random(20_261_127)
    written = [*_texts(), *map(_case, _documents())]
    assert len(written) < size
    return [*written, *_single_values(), *(_generated(generator) for _ in range(size - len(written)))]


def _case(document: Any, *models: str) -> Case:
    return Case(body=json.dumps(document).encode(), models=models)


_ROW = {
    "double": 1.5, "float": 0.1, "long": 2**40, "integer": 7, "boolean": True, "string": "ü", "binary": "AP8=",
    "datetime": "2026-01-02T03:04:05"
}  # fmt: skip
_KINDS = list(_ROW)
_PLAIN = {kind: value for kind, value in _ROW.items() if kind not in ("binary", "datetime")}


def _texts() -> list[Case]:
    table = b'{"dataframe_split": {"columns": ["a", "b", "c"], "data": [[1, 2, 3]]}}'
    bodies = [
        *(b"", b" ", b"not json", b"null", b"true", b"1", b'"text"', b"[]", b"[1]", b'[{"a": 1}]', b"{}", b"{"),
        *(b'{"a": 1}', b"{'inputs': [1]}", b'{"inputs": [1,]}', b'{"inputs": [NaN, 1, 2]}', b'{"inputs": NaN}'),
        *(b'{"inputs": [[Infinity, -Infinity, 1e999]]}', b'{"inputs": "\\ud800"}', b'{"inputs": "\xff"}'),
        *(b'\xef\xbb\xbf{"inputs": [[1, 2, 3]]}', '{"inputs": [[1, 2, 3]]}'.encode("utf-16")),
        *(b'{"inputs": [[1, 2, 3]]} trailing', b'{"inputs": ' + b"[" * 3_000 + b"]" * 3_000 + b"}"),
        *(b'{"inputs": ' + b"[" * 100_000, b'{"inputs": [[18446744073709551616, -9223372036854775809, 0]]}'),
        *(b'{"dataframe_records": [{"a": 18446744073709551616, "b": 9223372036854775808, "c": 1}]}',),
        *(
            b'{"dataframe_records": [{"a": NaN, "b": Infinity, "c": -0.0}]}',
            b'{"inputs": [[1]], "inputs": [[1, 2, 3]]}',
        ),
        *(
            b'{"dataframe_records": [{"a": 1, "a": 2, "b": 3, "c": 4}]}',
            b'{"inputs": "a\nb"}',
            b'{"inputs": "\\u0000"}',
        ),
        *(b'{"dataframe_records": [{"string": "\\ud83d\\ude00", "a": 1}, {"string": "\xf0\x9f\x98\x80", "a": 2}]}',),
        *(b'{"dataframe_records": [{"string": "\\ud83d", "a": 1}]}',),
    ]
    types = [
        *("application/json; charset=utf-8", "application/json;charset=UTF-8", "application/json; charset=latin-1"),
        *("application/json; charset=utf-16", "application/json; profile=x", "application/json;", "APPLICATION/JSON"),
        *(" application/json ", "application/json; charset= utf-8", "application/json; Charset=utf-8", "text/json", ""),
        *("text/plain", "application/x-www-form-urlencoded", "application/octet-stream", "*/*", "multipart/form-data"),
    ]
    tables = [
        *(b"a,b,c\n1,2,3\n", b"a,b,c\r\n1.5,x,\r\n", b"", b"a\n", b"1,2,3", b'a,b,c\n"1\n', b"a,b\n1,2,3\n4,5\n"),
        *(b"a,a\n1,2\n", "a,string\n1,ü\n".encode(), b"a,b,c\n\xff,1,2\n", b"a;b\n1;2\n", b"a,b,c\n1,2,3,4\n"),
        ",".join(_KINDS).encode() + b"\n1.5,0.5,1,2,True,x,y,2026-01-01\n",
    ]
    return [
        *(Case(body=body) for body in bodies),
        *(Case(body=table, content_type=each) for each in types),
        Case(body=table, content_type=None),
        *(Case(body=body, content_type="text/csv") for body in tables),
        Case(body=b"a,b,c\n1,2,3\n", content_type="text/csv; charset=utf-8"),
        Case(body=b"a,b,c\n1,2,3\n", content_type="text/csv; header=present"),
        Case(body=b"PAR1", content_type="application/vnd.apache.parquet"),
    ]


def _documents() -> list[Any]:
    split: dict[str, Any] = {"columns": ["a", "b", "c"], "data": [[1.5, 2.5, 3.5], [4.5, 5.5, 6.5]]}
    full: dict[str, Any] = {"columns": _KINDS, "data": [list(_ROW.values())]}
    chat = [{"role": "user", "content": "Hi, ü"}]
    return [
        {"dataframe_split": split},
        {"dataframe_split": {**split, "data": [[1, 2, 3], [4.5, 5, 6]]}},
        {"dataframe_split": {**split, "data": [[2**53 + 1, 2**63 - 1, -(2**63)]]}},
        {"dataframe_split": {**split, "columns": ["c", "b", "a"]}},
        {"dataframe_split": {**split, "columns": ["a", "b", "c", "d"], "data": [[1, 2, 3, 4]]}},
        {"dataframe_split": {**split, "columns": ["a", "b"], "data": [[1.5, 2.5]]}},
        {"dataframe_split": {**split, "columns": ["a", "a", "b"]}},
        {"dataframe_split": {**split, "columns": ["a", "b"]}},
        {"dataframe_split": {**split, "columns": [1, 2, 3]}},
        {"dataframe_split": {**split, "columns": "abc"}},
        {"dataframe_split": {**split, "columns": None}},
        {"dataframe_split": {**split, "index": [7, 8]}},
        {"dataframe_split": {**split, "index": ["x", "y"]}},
        {"dataframe_split": {**split, "index": [7]}},
        {"dataframe_split": {**split, "index": None}},
        {"dataframe_split": {**split, "more": 1}},
        {"dataframe_split": {"data": [[1.5, 2.5, 3.5]]}},
        {"dataframe_split": {"columns": ["a"]}},
        {"dataframe_split": {**split, "data": []}},
        {"dataframe_split": {**split, "data": [[]]}},
        {"dataframe_split": {**split, "data": None}},
        {"dataframe_split": {**split, "data": "abc"}},
        {"dataframe_split": {**split, "data": [[1, 2, 3], [4, 5]]}},
        {"dataframe_split": {**split, "data": [[1, 2, 3], {"a": 1}]}},
        {"dataframe_split": {**split, "data": [1, 2, 3]}},
        {"dataframe_split": {**split, "data": [{"a": 1, "b": 2, "c": 3}]}},
        {"dataframe_split": {**split, "data": [[True, False, True]]}},
        {"dataframe_split": {**split, "data": [[None, 1, 2]]}},
        {"dataframe_split": {**split, "data": [["1", "2", "x"]]}},
        {"dataframe_split": {**split, "data": [[[1], {"x": 1}, 2]]}},
        {"dataframe_split": full},
        {"dataframe_split": {**full, "data": [full["data"][0]] * 3}},
        {"dataframe_split": {**full, "columns": _KINDS[::-1], "data": [full["data"][0][::-1]]}},
        {"dataframe_split": [split]},
        {"dataframe_split": None},
        {"dataframe_records": [dict(zip("abc", (1.5, 2, 3), strict=True))]},
        {"dataframe_records": [_ROW, _ROW]},
        {"dataframe_records": [{"a": 1, **_ROW}]},
        {"dataframe_records": [{"a": 1}, {"a": 2}]},
        {"dataframe_records": [{"a": 1, "string": "x"}, {"string": "y", "a": 2}]},
        {"dataframe_records": [{"a": 1, "string": "x"}, {"a": 2}]},
        {"dataframe_records": [{"a": 1}, 2]},
        {"dataframe_records": [{}]},
        {"dataframe_records": []},
        {"dataframe_records": {"a": [1]}},
        {"dataframe_records": "a"},
        {"dataframe_records": [[1, 2]]},
        {"dataframe_records": [_PLAIN, {**_PLAIN, "integer": -(2**31)}, {**_PLAIN, "float": 2**63 - 1}]},
        {"dataframe_split": {"columns": list(_PLAIN), "data": [list(_PLAIN.values())] * 2}},
        {"dataframe_records": [{"a": [1.5, 2], "b": {"x": 1, "y": "z"}, "c": {"k": "v"}, "d": [1, "x"]}]},
        {"dataframe_records": [{"a": [1.5, "x"], "b": {"x": 1}}]},
        {"dataframe_records": [{"a": [], "b": {"x": "1"}}]},
        {"dataframe_records": [{"a": [1.5], "b": {"z": 1}}]},
        {"inputs": {"a": [1.5], "b": {"x": 1}}},
        {"inputs": [[1.5, 2.5, 3.5]]},
        {"inputs": [[1, 2, 3], [4, 5, 6]]},
        {"inputs": [[1, 2], [3, 4]]},
        {"inputs": [[1, 2], [3]]},
        {"inputs": [["1", "2", "3"]]},
        {"inputs": [[True, None, 3]]},
        {"inputs": []},
        {"inputs": [[]]},
        {"inputs": 1},
        {"inputs": "text"},
        {"inputs": ["a", "b"]},
        {"inputs": None},
        {"inputs": {}},
        {"inputs": {"a": [[1, 2], [3, 4]], "b": [1, 2]}},
        {"inputs": {"a": [[1, 2]], "b": [1.5]}},
        {"inputs": {"a": [[1, 2]]}},
        {"inputs": {"a": [[1, 2]], "b": [1], "c": [1]}},
        {"inputs": {"a": "x"}},
        {"inputs": [{"a": 1, "string": "x"}]},
        {"inputs": [{"a": 1}, 2]},
        {"instances": [[1.5, 2.5, 3.5]]},
        {"instances": [{"a": [1, 2], "b": 1}, {"a": [3, 4], "b": 2}]},
        {"instances": [{"a": 1, "string": "x"}, {"a": 2}]},
        {"instances": {"a": [[1, 2]], "b": [1, 2, 3]}},
        {"instances": []},
        {"instances": ["a", "b"]},
        {"instances": [[1, 2, 3]], "signature_name": "serving_default"},
        {"inputs": [[1, 2, 3]], "instances": [[1, 2, 3]]},
        {"inputs": [[1, 2, 3]], "dataframe_split": split},
        {"inputs": [[1, 2, 3]], "client_request_id": "x", "databricks_options": {"return_trace": True}},
        {"columns": ["a"], "data": [[1]]},
        {"dataframe_records": [{"a": 1, "string": "x"}], "params": {"temperature": 0.25, "n": 2, "stop": ["a", "b"]}},
        {"dataframe_records": [{"a": 1, "string": "x"}], "params": {"temperature": 1, "more": 1}},
        {"dataframe_records": [{"a": 1, "string": "x"}], "params": {"n": "x"}},
        {"dataframe_records": [{"a": 1, "string": "x"}], "params": [1]},
        {"dataframe_records": [{"a": 1, "string": "x"}], "params": None},
        {"dataframe_records": [{"a": 1, "string": "x"}], "stream": False},
        {"dataframe_records": [{"a": 1, "string": "x"}], "stream": "true"},
        {"inputs": [[1, 2, 3]], "params": {"temperature": 1}},
        {"inputs": [[1, 2, 3]], "stream": True},
        {"messages": chat, "stream": True},
        {"messages": chat},
        {"messages": chat, "temperature": 0.5, "max_tokens": 10, "n": 2, "stop": ["x"], "extra_params": {"a": 1}},
        {"messages": chat, "temperature": "hot"},
        {"messages": [{"role": "user"}]},
        {"messages": "Hi"},
        {"messages": []},
        {"messages": chat, "params": {"temperature": 1}},
        {"messages": chat, "dataframe_split": split},
        {"messages": chat, "inputs": [[1, 2, 3]]},
        {"prompt": "Hi", "max_tokens": 5},
        {"prompt": ["a", "b"]},
        {"input": "Hi"},
        {"input": [{"role": "user", "content": "Hi"}]},
        {"input": [{"role": "user", "content": "Hi"}], "stream": True},
        {"input": [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]}]},
        {"input": []},
    ]


_VALUES: list[Any] = [
    *(0, 1, -1, 2, 255, 2**31 - 1, 2**31, 2**53, 2**53 + 1, 2**63 - 1, -(2**63)),
    *(2**63, 2**64, 10**30, -(2**63) - 1, -(10**30)),  # too large for 64 bits
    *(0.0, -0.0, 0.1, 1.5, 1e300, 5e-324, 16777217, 16777217.0, 3.4e39, float("nan"), float("inf")),
    *(True, False, None, "", "x", "1", "ü", "2026-01-02", "2026-01-02T03:04:05.678Z", "not a date", "AP8=", "nan"),
    *([], [1], [1.5, 2], ["x"], {}, {"x": 1}, {"x": 1, "y": "z"}, [[1, 2], [3, 4]]),
]


def _single_values() -> list[Case]:
    """Each kind of value in each kind of column."""
    rows = [{**_PLAIN, kind: value} for kind in _PLAIN for value in _VALUES]
    plain = [{"dataframe_records": [row] if number % 2 else [row, _PLAIN]} for number, row in enumerate(rows)]
    all_kinds = [{"dataframe_records": [{**_ROW, kind: value}]} for kind in _ROW for value in _VALUES[::3]]
    return [
        *(_case(document, "plain", "plain, optional") for document in plain),
        *(_case(document, "columns", "optional") for document in all_kinds),
    ]


def _generated(generator: random.Random) -> Case:
    """A table in one of the formats, of which most columns hold what their labels promise."""
    labels = _labels(generator)
    count = generator.choice([1, 1, 2, 3])
    columns = [_column(label, count, generator) for label in labels]
    rows = [list(row) for row in zip(*columns, strict=True)]
    records = [dict(zip(labels, row, strict=True)) for row in rows]
    document: dict[str, Any] = generator.choice(
        [
            *[{"dataframe_split": {"columns": labels, "data": rows}}] * 3,
            *[{"dataframe_records": records}] * 3,
            {"inputs": rows},
            {"inputs": dict(zip(labels, columns, strict=True))},
            {"inputs": records},
            {"instances": records},
        ]
    )
    if generator.random() < 0.2:
        document["params"] = {"temperature": generator.choice(_VALUES), "n": generator.choice([1, 2, "x"])}
    return _case(document)


def _labels(generator: random.Random) -> list[str]:
    """Mostly those of a signature."""
    chosen = generator.choice([["a", "b", "c"], _KINDS, ["a", "string"], list(_PLAIN), ["a", *_PLAIN], ["a", "double"]])
    labels = list(chosen)
    if generator.random() < 0.2:
        generator.shuffle(labels)
    if generator.random() < 0.1:
        labels.pop()
    return labels


def _column(label: str, count: int, generator: random.Random) -> list[Any]:
    """Values of the kind that a label stands for, now and then with others among them."""
    kind = type(_ROW.get(label, generator.choice([1, 1.5])))
    fitting = [value for value in _VALUES if type(value) is kind]
    if label in ("long", "integer", "a"):
        fitting = fitting[: -5 if generator.random() < 0.9 else None]
    if label in ("binary", "datetime"):
        fitting = [_ROW[label]]
    return [generator.choice(fitting if generator.random() < 0.97 else _VALUES) for _ in range(count)]
