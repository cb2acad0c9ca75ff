"""How an endpoint is queried, as an OpenAPI 3.1 document made from its models' signatures (contract 5.16).

The rule: a schema shows one spelling that MLflow takes, the one that clients had better use. What it takes besides
(CSV, columns in another order, more of them) is not described.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from serving_service.mlmodel import Signature, UnusableSignature

Node = dict[str, Any]

_LLM_COLUMNS = frozenset(("messages", "prompt", "input"))
"""MLflow takes a body with one of these at its top as the columns themselves, and answers it without a wrapper."""

_TIME: Node = {
    "type": "string",
    "pattern": r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,9})?$",
    "description": "A time in ISO 8601 without an offset from UTC, which MLflow does not take.",
}
_SCALARS: dict[str, Node] = {
    "boolean": {"type": "boolean"},
    "integer": {"type": "integer", "format": "int32"},
    "long": {"type": "integer", "format": "int64"},
    "float": {"type": "number", "format": "float"},
    "double": {"type": "number", "format": "double"},
    "string": {"type": "string"},
    "binary": {"type": "string", "contentEncoding": "base64"},
    "datetime": _TIME,
}
_KINDS: tuple[tuple[re.Pattern[str], Node], ...] = (
    (re.compile(r"bool"), {"type": "boolean"}),
    (re.compile(r"u?int(8|16|32|64)"), {"type": "integer"}),
    (re.compile(r"float32"), {"type": "number", "format": "float"}),
    (re.compile(r"float64"), {"type": "number", "format": "double"}),
    (re.compile(r"(float|complex)[0-9]+"), {"type": "number"}),
    (re.compile(r"str|bytes"), {"type": "string"}),
    (re.compile(r"datetime64(\[[a-z]+\])?"), _TIME),
    (re.compile(r"object"), {}),
)
"""The names of numpy's types."""

_MOST_DIMENSIONS = 32

MOST_BYTES = 8 << 20
"""Of a document: half of what one message may hold."""

_ERROR: Node = {
    "type": "object",
    "required": ["error_code", "message"],
    "properties": {
        "error_code": {"type": "string", "description": "What went wrong, in a word."},
        "message": {"type": "string", "description": "The same in words, with the way out."},
    },
}


def document(name: str, url: str, version: int, entities: Mapping[str, Signature]) -> bytes:
    """The document, as JSON, of an endpoint whose data plane is at `url`, in the given version of its configuration.

    `entities` are the signatures of its served entities by name. Raises UnusableSignature, naming the entity.
    """
    paths: Node = {}
    for entity, signature in entities.items():
        try:
            paths[f"/served-models/{entity}/invocations"] = {"post": _operation(entity, signature)}
        except UnusableSignature as error:
            raise UnusableSignature(f"served entity '{entity}': {error}") from None
    described: Node = {
        "openapi": "3.1.0",
        "info": {"title": name, "version": str(version)},
        "servers": [{"url": url}],
        "security": [{"bearer": []}],
        "paths": paths,
        "components": {
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
            "schemas": {"Error": _ERROR},
            "responses": {
                "Error": {
                    "description": "The request was not answered.",
                    "content": _json({"$ref": "#/components/schemas/Error"}),
                }
            },
        },
    }
    text = json.dumps(described, ensure_ascii=False, separators=(",", ":")).encode()
    if len(text) > MOST_BYTES:
        raise UnusableSignature(f"the description would be larger than {MOST_BYTES} bytes")
    return text


def _operation(entity: str, signature: Signature) -> Node:
    return {
        "operationId": f"query-{entity}",
        "summary": f"Queries the served entity {entity}",
        "requestBody": {"required": True, "content": _json({"oneOf": _bodies(signature)})},
        "responses": {
            "200": {
                "description": "What the model answers.",
                "headers": {
                    "served-model-name": {"description": "Which entity answered.", "schema": {"type": "string"}}
                },
                "content": _json(_answer(signature)),
            },
            "4XX": {"$ref": "#/components/responses/Error"},
            "5XX": {"$ref": "#/components/responses/Error"},
        },
    }


# What is asked


def _bodies(signature: Signature) -> list[Node]:
    """The bodies that the model takes, each as a schema; every one needs a field that the others do not have."""
    params = _params(signature.params)
    beside = {"params": _object(params)} if params else {}
    if _are_tensors(signature.inputs):
        wrapped = _tensor_bodies(signature.inputs)
    elif signature.is_from_type_hint:
        wrapped = {"inputs": _hinted(signature.inputs)}
    else:
        wrapped = _frames(signature.inputs)
    bodies = [_body(field, schema, beside) for field, schema in wrapped.items()]
    if said := _llm_columns(signature):
        columns = _columns(signature.inputs)
        bodies.append(
            _titled("unwrapped", _object(columns | params, required=sorted({*_required(signature.inputs), said})))
        )
    return bodies


def _body(field: str, schema: Node, beside: Node) -> Node:
    return _titled(field, _object({field: schema} | beside, required=[field]))


def _frames(columns: list[Node]) -> Node:
    """A table, in the two spellings that its columns allow."""
    if not _have_names(columns):
        return {"dataframe_split": _split(None, [_type(column) for column in columns])}
    types, required = _columns(columns), _required(columns)
    variants = [_split(list(types), list(types.values()))]
    if 0 < len(required) < len(types):
        variants.append(_split(required, [types[name] for name in required]))
    return {
        "dataframe_split": variants[0] if len(variants) == 1 else {"anyOf": variants},
        # Open: MLflow drops columns that it does not know.
        "dataframe_records": {"type": "array", "minItems": 1, "items": _object(types, required=required)},
    }


def _split(names: list[str] | None, types: list[Node]) -> Node:
    fields: Node = {"data": {"type": "array", "items": _tuple(types)}, "index": {"type": "array"}}
    if names is None:
        return _object(fields, required=["data"], is_closed=True)
    labels = _tuple([{"const": name} for name in names])
    return _object({"columns": labels} | fields, required=["columns", "data"], is_closed=True)


def _hinted(inputs: list[Node]) -> Node:
    """What a type hint is about is a list of things, told by one type or by the names of their parts."""
    if not _have_names(inputs):
        return {"type": "array", "items": _type(inputs[0])}
    return {"type": "array", "items": _object(_columns(inputs), required=_required(inputs))}


def _tensor_bodies(tensors: list[Node]) -> Node:
    """`inputs` as whole tensors, and where all of them have rows, `instances` row by row."""
    shapes = [_shape(tensor) for tensor in tensors]
    kinds = [_kind(tensor) for tensor in tensors]
    whole = [_nested(kind, shape) for kind, shape in zip(kinds, shapes, strict=True)]
    has_rows = all(shapes) and len({shape[0] for shape in shapes if shape}) == 1
    if not _have_names(tensors):
        return {"inputs": whole[0]} | ({"instances": whole[0]} if has_rows else {})
    names = [_name(tensor) for tensor in tensors]
    bodies: Node = {"inputs": _object(dict(zip(names, whole, strict=True)), required=names)}
    if has_rows:
        rows = [_nested(kind, shape[1:]) for kind, shape in zip(kinds, shapes, strict=True)]
        bodies["instances"] = _list(_object(dict(zip(names, rows, strict=True)), required=names), shapes[0][0])
    return bodies


def _params(params: list[Node]) -> Node:
    """The parameters with their defaults; none has to be given."""
    return {_name(param): _param(param) for param in params}


def _param(param: Node) -> Node:
    kind = _type({**param, "type": param.get("type") or param.get("dtype")})
    schema = dict(kind) if param.get("shape") is None else {"type": "array", "items": kind}
    if param.get("default") is not None:
        schema["default"] = param["default"]
    return schema


# What is answered


def _answer(signature: Signature) -> Node:
    wrapped = _object({"predictions": _predictions(signature.outputs)}, required=["predictions"])
    if not _llm_columns(signature):
        return wrapped
    outputs = signature.outputs
    plain = outputs and not _are_tensors(outputs) and _have_names(outputs)
    return {"anyOf": [wrapped, _object(_columns(outputs), required=_required(outputs)) if plain else {}]}


def _predictions(outputs: list[Node]) -> Node:
    """MLflow writes tables as records; what a model returns in another form is answered in that form."""
    if not outputs:
        return {}
    if _are_tensors(outputs):
        whole = [_nested(_kind(tensor), _shape(tensor)) for tensor in outputs]
        if not _have_names(outputs):
            return whole[0]
        names = [_name(tensor) for tensor in outputs]
        return _object(dict(zip(names, whole, strict=True)), required=names)
    if _have_names(outputs):
        record = _object(_columns(outputs), required=_required(outputs))
        return {"anyOf": [{"type": "array", "items": record}, record]}
    types = [_type(column) for column in outputs]
    if len(types) == 1:
        return {"type": "array", "items": types[0]}
    record = _object({str(i): kind for i, kind in enumerate(types)}, required=[str(i) for i in range(len(types))])
    return {"type": "array", "items": {"anyOf": [_tuple(types), record]}}


# Columns, tensors, types


def _llm_columns(signature: Signature) -> str | None:
    """The column that makes a body one of the kind that LLM APIs take, if the model has such a one."""
    inputs = signature.inputs
    if _are_tensors(inputs) or signature.is_from_type_hint or not _have_names(inputs):
        return None
    return next((name for name in map(_name, inputs) if name in _LLM_COLUMNS), None)


def _are_tensors(parts: list[Node]) -> bool:
    kinds = {part.get("type") == "tensor" for part in parts}
    if len(kinds) > 1:
        raise UnusableSignature("its signature mixes columns and tensors")
    return kinds == {True}


def _have_names(parts: list[Node]) -> bool:
    """Whether the columns or tensors are named, which is all or none."""
    named = {part.get("name") is not None for part in parts}
    if len(named) > 1:
        raise UnusableSignature("its signature names some columns and others not")
    if named == {False} and len(parts) > 1 and _are_tensors(parts):
        raise UnusableSignature("its signature has several tensors without names")
    if named == {True} and len({_name(part) for part in parts}) < len(parts):
        raise UnusableSignature("its signature uses a name twice")
    return named == {True}


def _name(part: Node) -> str:
    name = part.get("name")
    if not isinstance(name, str):
        raise UnusableSignature("its signature has a name that is no text")
    return name


def _columns(columns: list[Node]) -> dict[str, Node]:
    return {_name(column): _type(column) for column in columns}


def _required(columns: list[Node]) -> list[str]:
    return [_name(column) for column in columns if _is_required(column)]


def _is_required(part: Node) -> bool:
    return part.get("required") is not False


def _type(node: Any) -> Node:
    """The schema of a column, of a property, or of what stands in a list."""
    kind = node.get("type") if isinstance(node, dict) else None
    if not isinstance(kind, str):
        raise UnusableSignature("its signature has a type that is no text")
    if kind in _SCALARS:
        return _SCALARS[kind]
    if kind == "any":
        return {}
    if kind == "sparkml_vector":
        return {"type": "array", "items": _SCALARS["double"]}
    if kind == "array":
        return {"type": "array", "items": _type(node.get("items"))}
    if kind == "map":
        return {"type": "object", "additionalProperties": _type(node.get("values"))}
    properties = node.get("properties")
    if kind == "object" and isinstance(properties, dict):
        types = {name: _type(each) for name, each in properties.items()}
        required = [name for name, each in properties.items() if _is_required(each)]
        # Closed: other than of a column, MLflow refuses a property that it does not know.
        return _object(types, required=required, is_closed=True)
    raise UnusableSignature(f"its signature has a type that is not known here: {kind[:40]!r}")


def _kind(tensor: Node) -> Node:
    name = _spec(tensor).get("dtype")
    for pattern, schema in _KINDS:
        if isinstance(name, str) and pattern.fullmatch(name):
            return schema | {"format": name} if schema == {"type": "integer"} else schema
    raise UnusableSignature("its signature has a tensor of a type that is not known here")


def _shape(tensor: Node) -> list[int]:
    shape = _spec(tensor).get("shape")
    if not isinstance(shape, list) or len(shape) > _MOST_DIMENSIONS:
        raise UnusableSignature(
            f"its signature has a tensor without a shape, or of more than {_MOST_DIMENSIONS} dimensions"
        )
    if not all(type(size) is int and -1 <= size < 2**31 for size in shape):
        raise UnusableSignature("its signature has a tensor with a size that is none")
    return shape


def _spec(tensor: Node) -> Node:
    spec = tensor.get("tensor-spec")
    if not isinstance(spec, dict):
        raise UnusableSignature("its signature has a tensor that is not specified")
    return spec


def _nested(kind: Node, shape: list[int]) -> Node:
    schema = kind
    for size in reversed(shape):
        schema = _list(schema, size)
    return schema


def _list(items: Node, size: int) -> Node:
    """A list of `size` things; -1: of one or more, since nothing has no shape."""
    bounds = {"minItems": 1} if size < 0 else {"minItems": size, "maxItems": size}
    return {"type": "array", "items": items} | bounds


def _tuple(types: list[Node]) -> Node:
    return {"type": "array", "prefixItems": types, "minItems": len(types), "maxItems": len(types)}


def _object(properties: Mapping[str, Node], *, required: list[str] | None = None, is_closed: bool = False) -> Node:
    schema: Node = {"type": "object", "properties": dict(properties)}
    if required:
        schema["required"] = required
    if is_closed:
        schema["additionalProperties"] = False
    return schema


def _titled(title: str, schema: Node) -> Node:
    return {"title": title} | schema


def _json(schema: Node) -> Node:
    return {"application/json": {"schema": schema}}
