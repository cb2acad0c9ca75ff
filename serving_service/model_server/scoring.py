"""From the body of an invocation to its answer. Runs in worker threads, and knows nothing of HTTP but statuses.

What a body means and which predictions come back is as MLflow's own scoring server has it; the ways in which ours
differs on purpose are a table in `tests/differential`.
"""

import re
from collections.abc import Generator, Iterator
from typing import Any

import pandas as pd

from serving_service.model_server import documents, failures, mlflow_rules
from serving_service.model_server.answers import Answer, Stream, error_event
from serving_service.model_server.frames import FrameReader, records
from serving_service.model_server.mlflow_rules import JSON, Parsed

_JSON_TYPE = re.compile(rf"\s*{JSON}\s*(;\s*charset=(?i:utf-8)\s*)?")
_DONE = b"data: [DONE]\n\n"


class Scoring:
    """Answers for one model."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.metadata = model.metadata
        plain = mlflow_rules.enforces_nothing_but_a_schema(model)
        self._reader = FrameReader.of(self.metadata.get_input_schema()) if plain else None
        self._unchecked = mlflow_rules.without_input_schema(model) if self._reader else None

    def answer(self, body: bytes, content_type: str) -> Answer | Stream:
        """Raises nothing that a body or a model can cause."""
        try:
            document = documents.read(body) if _JSON_TYPE.fullmatch(content_type) else None
        except (ValueError, RecursionError):
            document = None  # MLflow has words for it
        try:
            if type(document) is not dict:
                return _other(mlflow_rules.answer_other(body, content_type, self))
            if document.get("stream") is True:
                return self._stream(document)
            return self._predictions(document)
        except Exception as error:
            return _refusal(error)

    def predict(self, data: Any, params: Any = None) -> Any:
        """For MLflow, when it answers what is no JSON object."""
        return mlflow_rules.predict(self._model, data, params)

    def _predictions(self, document: dict[str, Any]) -> Answer:
        frame = self._frame(document)
        if frame is None:
            model, parsed = self._model, mlflow_rules.parse(document, self._model)
        else:
            model, parsed = self._unchecked, Parsed(frame, document.get("params"), is_unwrapped=False)
        try:
            predictions = _jsonable(mlflow_rules.predict(model, parsed.data, parsed.params))
        except mlflow_rules.RefusedError as error:
            error.message = f"Failed to predict data '{parsed.data}'. \nError: {error.message}"
            raise
        return Answer(200, _json(predictions if parsed.is_unwrapped else {"predictions": predictions}))

    def _frame(self, document: dict[str, Any]) -> pd.DataFrame | None:
        """What MLflow would make of the body and let the model have, if that is certain without asking it."""
        formats = mlflow_rules.FORMATS & document.keys()
        if self._reader is None or len(formats) != 1 or mlflow_rules.is_unwrapped(document):
            return None
        return self._reader.read(document)

    def _stream(self, document: dict[str, Any]) -> Stream:
        events = _events(mlflow_rules.predict_stream(self._model, mlflow_rules.parse(document, self._model)))
        return Stream(next(events), events)


def _events(chunks: Iterator[Any]) -> Generator[bytes, None, None]:
    """An event for each chunk. An error before the first is raised, as it is no stream yet; a later one is the last."""
    has_begun = False
    try:
        for chunk in chunks:
            yield b"data: " + _json(_jsonable(chunk)) + b"\n\n"
            has_begun = True
        yield _DONE
    except Exception as error:
        if not has_begun:
            raise
        yield error_event(_refusal(error).body)
    finally:
        if hasattr(chunks, "close"):
            chunks.close()


def _jsonable(predictions: Any) -> Any:
    if isinstance(predictions, pd.DataFrame | pd.Series) and (plain := records(predictions)) is not None:
        return plain
    return mlflow_rules.jsonable(predictions)


def _json(value: Any) -> bytes:
    return documents.write(value, simpler=mlflow_rules.simpler, otherwise=mlflow_rules.to_json)


def _other(answer: mlflow_rules.Other) -> Answer:
    if answer.status < 400:
        return Answer(answer.status, answer.text.encode())
    return Answer(answer.status, failures.envelope("BAD_REQUEST", answer.text))


def _refusal(error: Exception) -> Answer:
    if isinstance(error, mlflow_rules.RefusedError) and not isinstance(error, mlflow_rules.ModelError):
        # What goes wrong in a model is the caller's or the model's doing: a client must not repeat it.
        status = mlflow_rules.status(error)
        return Answer(status if status < 500 else 400, failures.envelope("BAD_REQUEST", str(error.message)))
    failures.log(error)
    return Answer(400, failures.envelope("BAD_REQUEST", failures.MODEL_FAILED))
