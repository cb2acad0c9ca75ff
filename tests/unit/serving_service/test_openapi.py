"""The description of an endpoint, made from signatures."""

from __future__ import annotations

import json
from typing import Any

import openapi_spec_validator
import pytest
from jsonschema import Draft202012Validator

from serving_service import openapi
from serving_service.mlmodel import Signature, UnusableSignature
from tests.support.json_bodies import bodies

URL = "https://tessera.example/serving-endpoints/e"


def document(*inputs: Any, outputs: Any = (), params: Any = (), is_from_type_hint: bool = False) -> Any:
    signature = Signature(list(inputs), list(outputs), list(params), is_from_type_hint)
    made = json.loads(openapi.document("e", URL, 3, {"m": signature}))
    openapi_spec_validator.validate(made)
    return made


def operation(*inputs: Any, **parts: Any) -> Any:
    return document(*inputs, **parts)["paths"]["/served-models/m/invocations"]["post"]


def request(*inputs: Any, **parts: Any) -> Any:
    return operation(*inputs, **parts)["requestBody"]["content"]["application/json"]["schema"]


def answer(*outputs: Any, **parts: Any) -> Any:
    made = operation(column("long"), outputs=outputs, **parts)
    return made["responses"]["200"]["content"]["application/json"]["schema"]


def column(kind: str, name: str | None = "a", **more: Any) -> Any:
    return {"type": kind, "required": True, **({"name": name} if name is not None else {}), **more}


def tensor(dtype: str, *shape: int, name: str | None = None) -> Any:
    spec = {"type": "tensor", "tensor-spec": {"dtype": dtype, "shape": list(shape)}}
    return spec | ({"name": name} if name is not None else {})


def takes(schema: Any, body: Any) -> bool:
    return bool(Draft202012Validator(schema).is_valid(body))


def type_of(described: Any) -> Any:
    """The schema of the one column, read from the records."""
    records = next(one for one in request(described)["oneOf"] if one["title"] == "dataframe_records")
    return records["properties"]["dataframe_records"]["items"]["properties"]["a"]


def test_the_document_names_endpoint_server_and_version() -> None:
    made = document(column("long"))
    assert made["openapi"] == "3.1.0"
    assert made["info"] == {"title": "e", "version": "3"}
    assert made["servers"] == [{"url": URL}]
    assert list(made["paths"]) == ["/served-models/m/invocations"]
    assert list(made["paths"]["/served-models/m/invocations"]) == ["post"]


def test_every_entity_has_a_path_of_its_own() -> None:
    signatures = {name: Signature([column("long")], [], []) for name in ("one", "two-2")}
    made = json.loads(openapi.document("e", URL, 1, signatures))
    openapi_spec_validator.validate(made)
    assert list(made["paths"]) == ["/served-models/one/invocations", "/served-models/two-2/invocations"]


@pytest.mark.parametrize(
    ("kind", "schema"),
    [
        ("boolean", {"type": "boolean"}),
        ("integer", {"type": "integer", "format": "int32"}),
        ("long", {"type": "integer", "format": "int64"}),
        ("float", {"type": "number", "format": "float"}),
        ("double", {"type": "number", "format": "double"}),
        ("string", {"type": "string"}),
        ("binary", {"type": "string", "contentEncoding": "base64"}),
        ("any", {}),
        ("sparkml_vector", {"type": "array", "items": {"type": "number", "format": "double"}}),
    ],
)
def test_a_column_has_the_type_that_it_is_logged_with(kind: str, schema: Any) -> None:
    assert type_of(column(kind)) == schema


def test_a_time_has_no_offset() -> None:
    schema = type_of(column("datetime"))
    assert takes(schema, "2026-01-02T03:04:05.678")
    assert not takes(schema, "2026-01-02T03:04:05Z")
    assert not takes(schema, "2026-01-02T03:04:05+02:00")


def test_types_of_parts_are_described() -> None:
    item = {"type": "object", "properties": {"x": {"type": "long"}, "y": {"type": "string", "required": False}}}
    schema = type_of(column("array", items=item))
    assert takes(schema, [{"x": 1}, {"x": 2, "y": "u"}])
    assert not takes(schema, [{"y": "u"}])
    assert not takes(schema, [{"x": 1, "z": 1}])
    schema = type_of(column("map", values={"type": "array", "items": {"type": "boolean"}}))
    assert takes(schema, {"k": [True], "l": []})
    assert not takes(schema, {"k": [1]})


def test_columns_are_taken_as_split_and_as_records() -> None:
    schema = request(column("long"), column("string", "b"))
    assert [one["title"] for one in schema["oneOf"]] == ["dataframe_split", "dataframe_records"]
    assert takes(schema, {"dataframe_split": {"columns": ["a", "b"], "data": [[1, "x"], [2, "y"]]}})
    assert takes(schema, {"dataframe_records": [{"a": 1, "b": "x"}]})
    assert not takes(schema, {"dataframe_records": [{"a": 1}]})
    assert not takes(schema, {"dataframe_records": [{"a": "1", "b": "x"}]})
    assert not takes(schema, {"dataframe_split": {"columns": ["a", "b"], "data": [["x", 1]]}})
    assert not takes(schema, {"dataframe_split": {"columns": ["a", "b"], "data": [[1]]}})
    assert not takes(schema, {"inputs": [[1, "x"]]})
    # As MLflow has it: one format only.
    both = {"dataframe_split": {"columns": ["a", "b"], "data": []}, "dataframe_records": [{"a": 1, "b": "x"}]}
    assert not takes(schema, both)


def test_an_optional_column_may_be_left_out_of_all_rows() -> None:
    schema = request(column("long"), column("string", "b", required=False))
    assert takes(schema, {"dataframe_records": [{"a": 1}]})
    assert takes(schema, {"dataframe_split": {"columns": ["a"], "data": [[1]]}})
    assert takes(schema, {"dataframe_split": {"columns": ["a", "b"], "data": [[1, "x"]]}})
    assert not takes(schema, {"dataframe_records": [{"b": "x"}]})


def test_columns_without_names_are_taken_by_their_order() -> None:
    schema = request(column("double", None), column("string", None))
    assert takes(schema, {"dataframe_split": {"data": [[0.5, "x"]]}})
    assert not takes(schema, {"dataframe_split": {"data": [["x", 0.5]]}})


def test_a_type_hint_takes_inputs_alone() -> None:
    schema = request(column("string", None), is_from_type_hint=True)
    assert takes(schema, {"inputs": ["x", "y"]})
    assert not takes(schema, {"inputs": [1]})
    assert not takes(schema, {"dataframe_split": {"data": [["x"]]}})


def test_columns_of_llm_bodies_are_taken_without_a_wrapper_too() -> None:
    n = {"name": "n", "type": "long", "default": 1, "shape": None}
    schema = request(
        column("array", "messages", items={"type": "any"}), column("double", "t", required=False), params=[n]
    )
    assert takes(schema, {"messages": [{}], "t": 0.5, "n": 2})
    assert takes(schema, {"dataframe_records": [{"messages": [{}]}], "params": {"n": 2}})
    assert not takes(schema, {"messages": "x"})
    assert not takes(schema, {"t": 0.5})


def test_parameters_have_their_types_and_defaults() -> None:
    params = [
        {"name": "t", "type": "double", "default": 0.5, "shape": None},
        {"name": "stop", "dtype": "string", "default": ["x"], "shape": [-1]},
        {"name": "none", "type": "long", "default": None, "shape": None},
    ]
    schema = request(column("long"), params=params)
    for one in schema["oneOf"]:
        assert one["properties"]["params"]["properties"] == {
            "t": {"type": "number", "format": "double", "default": 0.5},
            "stop": {"type": "array", "items": {"type": "string"}, "default": ["x"]},
            "none": {"type": "integer", "format": "int64"},
        }
    assert takes(schema, {"dataframe_records": [{"a": 1}], "params": {"stop": ["y"]}})
    assert takes(schema, {"dataframe_records": [{"a": 1}]})
    assert not takes(schema, {"dataframe_records": [{"a": 1}], "params": {"t": "hot"}})


def test_a_model_without_parameters_shows_none() -> None:
    assert "params" not in json.dumps(request(column("long")))


def test_a_tensor_is_taken_whole_and_in_rows() -> None:
    schema = request(tensor("float64", -1, 2))
    assert [one["title"] for one in schema["oneOf"]] == ["inputs", "instances"]
    for name in ("inputs", "instances"):
        assert takes(schema, {name: [[1, 2], [3, 4]]})
        assert not takes(schema, {name: []})
        assert not takes(schema, {name: [[1, 2, 3]]})
        assert not takes(schema, {name: [1, 2]})
    assert not takes(schema, {"inputs": [[1, 2]], "instances": [[1, 2]]})


def test_named_tensors_are_taken_whole_and_in_rows() -> None:
    schema = request(tensor("float32", -1, 2, name="a"), tensor("int64", -1, name="b"))
    assert takes(schema, {"inputs": {"a": [[1, 2]], "b": [1]}})
    assert takes(schema, {"instances": [{"a": [1, 2], "b": 1}, {"a": [1, 2], "b": 1}]})
    assert not takes(schema, {"inputs": {"a": [[1, 2]]}})
    assert not takes(schema, {"instances": {"a": [[1, 2]], "b": [1]}})


def test_tensors_whose_rows_do_not_go_together_are_taken_whole_alone() -> None:
    for tensors in (
        (tensor("float32", 3, name="a"), tensor("float32", 4, name="b")),
        (tensor("float32", name="a"), tensor("float32", -1, name="b")),
    ):
        assert [one["title"] for one in request(*tensors)["oneOf"]] == ["inputs"]
    assert [one["title"] for one in request(tensor("float32"))["oneOf"]] == ["inputs"]


@pytest.mark.parametrize(
    ("dtype", "schema"),
    [
        ("bool", {"type": "boolean"}),
        ("int8", {"type": "integer", "format": "int8"}),
        ("uint64", {"type": "integer", "format": "uint64"}),
        ("float16", {"type": "number"}),
        ("float32", {"type": "number", "format": "float"}),
        ("float64", {"type": "number", "format": "double"}),
        ("complex128", {"type": "number"}),
        ("str", {"type": "string"}),
        ("object", {}),
    ],
)
def test_a_tensor_has_the_type_that_it_is_logged_with(dtype: str, schema: Any) -> None:
    made = request(tensor(dtype, -1))["oneOf"][0]["properties"]["inputs"]
    assert made == {"type": "array", "minItems": 1, "items": schema}


def test_answers_are_described() -> None:
    assert takes(answer(), {"predictions": {"anything": 1}})
    assert not takes(answer(), {"outputs": 1})
    one = answer(column("double", None))
    assert takes(one, {"predictions": [0.5]})
    assert not takes(one, {"predictions": ["x"]})
    named = answer(column("long"), column("string", "b"))
    assert takes(named, {"predictions": [{"a": 1, "b": "x"}]})
    assert not takes(named, {"predictions": [{"a": "x", "b": "x"}]})
    unnamed = answer(column("long", None), column("string", None))
    assert takes(unnamed, {"predictions": [[1, "x"]]})
    assert takes(unnamed, {"predictions": [{"0": 1, "1": "x"}]})
    assert takes(answer(tensor("float64", -1, 1)), {"predictions": [[0.5]]})
    assert not takes(answer(tensor("float64", -1, 1)), {"predictions": [0.5]})


def test_an_answer_to_a_body_without_a_wrapper_has_none() -> None:
    made = operation(column("any", "messages"), outputs=[column("string", "id")])
    schema = made["responses"]["200"]["content"]["application/json"]["schema"]
    assert takes(schema, {"id": "1"})
    assert not takes(schema, {"id": 1})


def test_bodies_made_of_a_description_fit_it() -> None:
    """What the tests make bodies with is right about the dialect."""
    schema = request(column("long"), column("map", "m", values={"type": "binary"}), column("datetime", "d"))
    assert len(bodies(schema)) > 5
    assert all(takes(schema, body) for body in bodies(schema))


@pytest.mark.parametrize(
    "inputs",
    [
        [{"name": "a"}],
        [{"type": ["long"], "name": "a"}],
        [{"type": "decimal", "name": "a"}],
        [{"type": "array", "name": "a"}],
        [{"type": "array", "name": "a", "items": "long"}],
        [{"type": "map", "name": "a", "values": {}}],
        [{"type": "object", "name": "a"}],
        [{"type": "object", "name": "a", "properties": {"x": 1}}],
        [{"type": "object", "name": "a", "properties": [1]}],
        [column("long", None), column("long")],
        [column("long"), column("long")],
        [column("long"), tensor("int8", 1, name="b")],
        [tensor("int8", 1), tensor("int8", 1)],
        [{"type": "long", "name": 1}],
        [{"type": "long", "name": ["x"]}],
        [{"type": "tensor"}],
        [{"type": "tensor", "tensor-spec": {"dtype": "int8"}}],
        [{"type": "tensor", "tensor-spec": {"dtype": "int8", "shape": [True]}}],
        [{"type": "tensor", "tensor-spec": {"dtype": "int8", "shape": [0.5]}}],
        [{"type": "tensor", "tensor-spec": {"dtype": "void", "shape": [1]}}],
        [{"type": "tensor", "tensor-spec": {"dtype": ["int8"], "shape": [1]}}],
        [tensor("int8", -2)],
        [tensor("int8", *[1] * 33)],
    ],
    ids=repr,
)
def test_what_is_no_signature_is_refused_by_name(inputs: Any) -> None:
    with pytest.raises(UnusableSignature, match="'m'"):
        openapi.document("e", URL, 1, {"m": Signature(inputs, [], [])})


def test_a_document_beyond_the_limit_is_refused() -> None:
    names = [str(n).zfill(1_000) for n in range(openapi.MOST_BYTES // 3_000)]
    wide = Signature([column("long", name) for name in names], [], [])
    with pytest.raises(UnusableSignature, match="larger"):
        openapi.document("e", URL, 1, {"m": wide})
