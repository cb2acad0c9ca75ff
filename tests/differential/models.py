"""Models of several flavours and signatures. Most answer with a description of what they were given, types included,
so that two servers which give a model different things cannot answer the same.

Imports mlflow: for `tests/differential/asking.py`, which is a process of its own. Annotations are not postponed,
because MLflow reads them.
"""

import datetime
import enum
import uuid
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import numpy as np
import pandas as pd
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema, TensorSpec
from mlflow.types.llm import (
    ChatChoice,
    ChatChoiceDelta,
    ChatChunkChoice,
    ChatCompletionChunk,
    ChatCompletionResponse,
    ChatMessage,
    ChatParams,
)
from mlflow.types.responses import ResponsesAgentRequest, ResponsesAgentResponse, ResponsesAgentStreamEvent
from mlflow.types.schema import AnyType, Array, Map, Object, Property


def described(value: Any) -> Any:
    """A value with everything that a model can see of it."""
    if isinstance(value, pd.DataFrame):
        return {
            "labels": [repr(label) for label in value.columns],
            "kind_of_labels": str(value.columns.dtype),
            "index": repr(value.index.tolist()),
            "kinds": [str(dtype) for dtype in value.dtypes],
            "columns": [[described(each) for each in value.iloc[:, i].tolist()] for i in range(value.shape[1])],
        }
    if isinstance(value, np.ndarray):
        return {"kind": str(value.dtype), "shape": list(value.shape), "values": repr(value.tolist())}
    if isinstance(value, dict):
        return {"keys": {key: described(each) for key, each in value.items()}}
    if isinstance(value, list):
        return [described(each) for each in value]
    return f"{type(value).__name__} {value!r}"


class Describing(mlflow.pyfunc.PythonModel):  # type: ignore[misc, name-defined]
    def predict(self, context: Any, model_input: Any, params: dict[str, Any] | None = None) -> Any:
        return {"input": described(model_input), "params": described(params)}

    def predict_stream(self, context: Any, model_input: Any, params: dict[str, Any] | None = None) -> Iterator[Any]:
        yield described(model_input)
        yield described(params)


class Doubling(mlflow.pyfunc.PythonModel):  # type: ignore[misc, name-defined]
    """Does as little as a model can do."""

    def predict(self, context: Any, model_input: Any) -> Any:
        return model_input * 2


class Color(enum.Enum):
    RED = "red"


class Failing(Exception):
    pass


class Answering(mlflow.pyfunc.PythonModel):  # type: ignore[misc, name-defined]
    """Answers with whatever kind of thing it is asked for by the first cell."""

    def predict(self, context: Any, model_input: Any, params: dict[str, Any] | None = None) -> Any:
        kind = model_input["kind"]
        kind = kind.iloc[0] if isinstance(kind, pd.Series) else kind
        answers = ANSWERS[str(kind)]
        return answers()


def _raise(error: Exception) -> Any:
    raise error


ANSWERS: dict[str, Any] = {
    "frame": lambda: pd.DataFrame({"a": [1, 2], "b": [0.5, 1.5]}),
    "doubles": lambda: pd.DataFrame({"a": [1.5, 2.5], "b": [0.1, 1e300]}),
    "singles": lambda: pd.DataFrame({"a": [0.1, 0.2]}, dtype="float32"),
    "numbered": lambda: pd.DataFrame(np.arange(6).reshape(2, 3)),
    "clashing": lambda: pd.DataFrame([[1, 2]], columns=[0, "0"]),
    "texts": lambda: pd.DataFrame({"a": ["x", None], "ü": ["\u2028", "€"]}),
    "indexed": lambda: pd.DataFrame({"a": [1, 2]}, index=["x", "y"]),
    "nested columns": lambda: pd.DataFrame([[1, 2]], columns=pd.MultiIndex.from_tuples([("a", 1), ("a", 2)])),
    "floating labels": lambda: pd.DataFrame([[1, 2]], columns=[0.5, 1.0]),
    "booleans": lambda: pd.DataFrame({"a": [True, False]}),
    "nullable": lambda: pd.DataFrame({"a": pd.array([1, None], dtype="Int64")}),
    "missing": lambda: pd.DataFrame({"a": [1.0, float("nan")], "b": [float("inf"), -0.0]}),
    "times": lambda: pd.DataFrame({"a": pd.to_datetime(["2026-01-01", "2026-01-02T03:04:05.678"])}),
    "nanoseconds": lambda: pd.DataFrame({"a": pd.to_datetime(["2026-01-01T00:00:00.123456789"]).as_unit("ns")}),
    "categories": lambda: pd.DataFrame({"a": pd.Categorical(["x", "y"])}),
    "empty frame": lambda: pd.DataFrame({"a": []}),
    "no frame": lambda: pd.DataFrame(),
    "series": lambda: pd.Series([1, 2], name="n"),
    "unnamed series": lambda: pd.Series([1.5, 2.5]),
    "text series": lambda: pd.Series(["x", "y"], name="n"),
    "series named oddly": lambda: pd.Series([1], name=("a", "b")),
    "array": lambda: np.array([[1.5, 2.5], [3.5, float("nan")]]),
    "small floats": lambda: np.array([0.1, 0.2], dtype="float32"),
    "scalar": lambda: np.float64(1.5),
    "whole scalar": lambda: np.int64(2**62),
    "zero dimensions": lambda: np.array(3),
    "array of texts": lambda: np.array(["a", "b"]),
    "array of bytes": lambda: np.array([b"a", b"bc"]),
    "array of objects": lambda: np.array([1, "a", None, np.float32(0.5)], dtype=object),
    "array of times": lambda: np.array(["2026-01-01"], dtype="datetime64[D]"),
    "list": lambda: [1, 2.5, "x", None, True],
    "list of scalars": lambda: [np.float32(0.1), np.int8(1), np.bool_(True)],
    "list of arrays": lambda: [np.array([1, 2]), np.array([0.5])],
    "list of infinities": lambda: [float("inf"), float("-inf"), float("nan")],
    "tuple": lambda: (1, (2, 3)),
    "set": lambda: {1},
    "generator": lambda: (number for number in range(2)),
    "dict": lambda: {"a": [1], "b": {"c": np.array([1.5])}},
    "dict of frames": lambda: {"a": pd.DataFrame({"x": [1]})},
    "dict of odd keys": lambda: {1: "a", None: "b", False: "c", 0.5: "d"},
    "dict of tuples": lambda: {(1, 2): "a"},
    "text": lambda: 'a "quoted" \\ text, \u00fc \U0001f600 \x00 \x7f \u2028',
    "surrogate": lambda: "\ud800",
    "null text": lambda: ["null", "NaN"],
    "bytes": lambda: [b"\x00\xff" * 60],
    "nothing": lambda: None,
    "boolean": lambda: True,
    "large": lambda: [2**63, 2**64, -(2**63) - 1, 10**30],
    "floats": lambda: [1e16, 1e-7, 1e22, 5e-324, 1.7976931348623157e308, -0.0, 0.1 + 0.2, 100.0],
    "dates": lambda: [
        datetime.date(2026, 1, 2),
        datetime.time(3, 4),
        datetime.datetime.fromisoformat("2026-01-02T03:04:05.000006"),
    ],
    "zoned": lambda: [
        datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC),
        pd.Timestamp("2026-01-02", tz="Europe/Berlin"),
    ],
    "timestamp": lambda: pd.Timestamp("2026-01-02T03:04:05.000000006"),
    "not a time": lambda: [pd.NaT],
    "not available": lambda: [pd.NA],
    "complex": lambda: 1j,
    "identifier": lambda: [uuid.UUID(int=1)],
    "enumeration": lambda: [Color.RED],
    "message": lambda: ChatMessage(role="user", content="hi"),
    "deep": lambda: _deep(300),
    "too deep": lambda: _deep(100_000),
    "fails": lambda: _raise(Failing("canary")),
    "refuses": lambda: _raise(mlflow.MlflowException("no such thing", error_code=5003)),
    "refuses, worded": lambda: _raise(mlflow.MlflowException.invalid_parameter_value("not like this")),
    "refuses, internally": lambda: _raise(mlflow.MlflowException("broken inside")),
    "times out": lambda: _raise(TimeoutError("upstream")),
    "ends": lambda: _raise(StopIteration()),
    "key error": lambda: _raise(KeyError("canary")),
}
"""One answer for each kind of thing that a model can return, or raise."""


def _deep(levels: int) -> Any:
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


class Hinted(mlflow.pyfunc.PythonModel):  # type: ignore[misc, name-defined]
    def predict(self, model_input: list[str], params: dict[str, Any] | None = None) -> list[str]:
        return [f"{type(each).__name__} {each}" for each in model_input]


class Chatting(mlflow.pyfunc.ChatModel):  # type: ignore[misc, name-defined]
    def predict(self, context: Any, messages: list[ChatMessage], params: ChatParams) -> ChatCompletionResponse:
        said = ChatMessage(role="assistant", content=f"{messages} {params}")
        return ChatCompletionResponse(choices=[ChatChoice(index=0, message=said)], created=1)

    def predict_stream(
        self, context: Any, messages: list[ChatMessage], params: ChatParams
    ) -> Generator[ChatCompletionChunk, None, None]:
        for message in messages:
            delta = ChatChoiceDelta(role="assistant", content=str(message.content))
            yield ChatCompletionChunk(choices=[ChatChunkChoice(index=0, delta=delta)], created=1)


class Responding(mlflow.pyfunc.ResponsesAgent):  # type: ignore[misc, name-defined]
    def predict(self, request: ResponsesAgentRequest) -> ResponsesAgentResponse:
        text = request.model_dump_json()
        return ResponsesAgentResponse(output=[self.create_text_output_item(text=text, id="1")])

    def predict_stream(self, request: ResponsesAgentRequest) -> Generator[ResponsesAgentStreamEvent, None, None]:
        for each in request.input:
            item = self.create_text_output_item(text=str(each), id="1")
            event = {"type": "response.output_item.done", "item": item}
            yield ResponsesAgentStreamEvent(**event)


def _load_pyfunc(path: str) -> Any:
    """Of the flavour that is a module of somebody's own."""
    return _Loaded()


class _Loaded:
    def predict(self, frame: Any) -> Any:
        return described(frame)


_KINDS = ("double", "float", "long", "integer", "boolean", "string", "binary", "datetime")

SIGNATURES: dict[str, ModelSignature | None] = {
    "none": None,
    "answers": None,
    "doubles": ModelSignature(inputs=Schema([ColSpec("double", name) for name in "abc"])),
    "columns": ModelSignature(inputs=Schema([ColSpec(kind, kind) for kind in _KINDS])),
    "plain": ModelSignature(inputs=Schema([ColSpec(kind, kind) for kind in _KINDS[:6]])),
    "plain, optional": ModelSignature(
        inputs=Schema([ColSpec("long", "a"), *(ColSpec(kind, kind, required=False) for kind in _KINDS[:6])])
    ),
    "optional": ModelSignature(
        inputs=Schema([ColSpec("long", "a"), *(ColSpec(kind, kind, required=False) for kind in _KINDS)])
    ),
    "unnamed": ModelSignature(inputs=Schema([ColSpec("double"), ColSpec("string")])),
    "nested": ModelSignature(
        inputs=Schema(
            [
                ColSpec(Array(DataType.double), "a"),
                ColSpec(Object([Property("x", DataType.long), Property("y", DataType.string, required=False)]), "b"),
                ColSpec(Map(DataType.string), "c", required=False),
                ColSpec(AnyType(), "d", required=False),  # type: ignore[no-untyped-call]
            ]
        )
    ),
    "double tensor": ModelSignature(inputs=Schema([TensorSpec(np.dtype("float64"), (-1, 3))])),
    "tensor": ModelSignature(inputs=Schema([TensorSpec(np.dtype("float64"), (-1, 3))])),
    "tensors": ModelSignature(
        inputs=Schema([TensorSpec(np.dtype("float32"), (-1, 2), "a"), TensorSpec(np.dtype("int64"), (-1,), "b")])
    ),
    "one tensor": ModelSignature(inputs=Schema([TensorSpec(np.dtype("str"), (-1,), "a")])),
    "params": ModelSignature(
        inputs=Schema([ColSpec("long", "a"), ColSpec("string", "string")]),
        params=ParamSchema(
            [
                ParamSpec("temperature", "double", 0.5),
                ParamSpec("n", "long", 1),
                ParamSpec("stop", "string", ["x"], (-1,)),
                ParamSpec("stream", "boolean", False),
            ]
        ),
    ),
}

_CLASSES = {"answers": Answering, "doubles": Doubling, "double tensor": Doubling}


def saved(name: str, folder: Path) -> Path:
    """Saves a model below a folder."""
    path = folder / name.replace(" ", "_")
    options: dict[str, Any] = {"pip_requirements": []}
    if name in SIGNATURES:
        options |= {"python_model": _CLASSES.get(name, Describing)(), "signature": SIGNATURES[name]}
    elif name == "module":
        signature = ModelSignature(inputs=Schema([ColSpec("long", "a"), ColSpec("double", "double")]))
        options |= {"loader_module": __name__, "data_path": None, "signature": signature}
    else:
        options |= {"python_model": {"hinted": Hinted, "chat": Chatting, "responses": Responding}[name]()}
    mlflow.pyfunc.save_model(path, **options)
    return path
