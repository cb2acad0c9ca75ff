"""From the folder of a model to the ASGI application that answers for it. The only importer of MLflow here."""

import os
from collections.abc import Iterator
from typing import Any

import mlflow.pyfunc
from mlflow.exceptions import MlflowException

from serving_service.model_server import failures
from serving_service.model_server.asgi import App
from serving_service.model_server.scoring import Scoring, scoring_server

_TIMEOUT_VARIABLE = "MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT"
_TIMEOUT_SECONDS = "597"  # the documented longest execution; MLflow's own default is a tenth of it


class TracedModel:
    """The model as MLflow's server sees it; an error in its code leaves its place in the log."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.metadata = model.metadata

    def predict(self, data: Any, params: dict[str, Any] | None = None) -> Any:
        try:
            return self._model.predict(data, params=params)
        except MlflowException:
            raise  # an input that does not fit, told to the caller; its text repeats the input
        except Exception as error:
            failures.log(error)
            raise

    def predict_stream(self, body: bytes) -> Iterator[Any]:
        """The chunks that the model gives for a JSON body."""
        schema = self.metadata.get_input_schema()
        # Private, but the one place that knows which bodies are wrapped; the public way leads to `predict` only.
        parsed = scoring_server._parse_json_data(body, self.metadata, schema)  # noqa: SLF001
        chunks: Iterator[Any] = self._model.predict_stream(parsed.data, params=parsed.params)
        return chunks


def load(path: str) -> App:
    """Raises whatever the loading of the model raises."""
    model = TracedModel(mlflow.pyfunc.load_model(path))
    is_declared = _TIMEOUT_VARIABLE in os.environ
    os.environ.setdefault(_TIMEOUT_VARIABLE, _TIMEOUT_SECONDS)
    app: App = scoring_server.init(model)
    if not is_declared:
        del os.environ[_TIMEOUT_VARIABLE]  # read by `init` alone; the model sees what was declared
    return Scoring(app, model.predict_stream)
