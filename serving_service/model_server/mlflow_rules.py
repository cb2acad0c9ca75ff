"""What only MLflow knows about a model: how it is loaded, what a body means to it, what an answer looks like.

The only importer of MLflow here, and the only place for its private names; `tests/differential` notices when one of
them is gone or means something else. A name that an older MLflow lacks is replaced by what that MLflow did.
"""

import contextlib
import copy
import importlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from mlflow.environment_variables import _MLFLOW_IS_IN_SERVING_ENVIRONMENT
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature

from serving_service.model_server.timing import model_at_work

# Partly annotated, partly wrongly.
_server: Any = importlib.import_module("mlflow.pyfunc.scoring_server")
_json_rules: Any = importlib.import_module("mlflow.utils.proto_json_utils")

MLFLOW_VERSION: str = _server.VERSION
RefusedError = MlflowException
"""What MLflow raises for a body that does not fit; its text, which repeats the body, is for the caller alone."""

JSON = "application/json"
FRAME_FORMATS = frozenset({"dataframe_split", "dataframe_records"})
FORMATS = FRAME_FORMATS | {"instances", "inputs"}

_TIMEOUT_VARIABLE = "MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT"
_TIMEOUT_SECONDS = 597.0  # the documented longest execution; MLflow's own default is a tenth of it

_encoder = _json_rules.NumpyEncoder()


class ModelError(RefusedError):
    """Wraps what a model raised that is no refusal, since this is what MLflow's server hands on as it is."""


class Parsed(NamedTuple):
    """A body as a model takes it."""

    data: Any
    params: Any
    is_unwrapped: bool
    """Whether it is a body of the kind that LLM APIs take, which is answered without `predictions` around."""


class Other(NamedTuple):
    """MLflow's answer to a body that is no JSON object."""

    text: str
    status: int
    media_type: str


def load(path: str) -> Any:
    """The model of a folder. Raises whatever the loading of the model raises."""
    os.environ[_MLFLOW_IS_IN_SERVING_ENVIRONMENT.name] = "true"
    _check_description(path)
    model = _server.load_model_with_mlflow_config(path)
    # What they say of a request repeats parts of it, and says it for every request.
    for name in ("mlflow.models.utils", "mlflow.pyfunc", "mlflow.pyfunc.model", _server.__name__):
        logging.getLogger(name).setLevel(logging.ERROR)
    return model


def _check_description(path: str) -> None:
    """Names the file when what the model says of itself is cut off or wrong; MLflow's errors are about what it did."""
    try:
        flavor = Model.load(path).flavors.get("python_function", {})
        if not isinstance(flavor, dict):
            raise TypeError(f"python_function is {flavor!r}")
    except Exception as error:
        raise ValueError(f"The model's file MLmodel cannot be read: {type(error).__name__}: {error}") from error


def learn_packages() -> None:
    """Looks up which modules the installed packages have: most of the time that the first loading of a model takes."""
    requirements: Any = importlib.import_module("mlflow.utils.requirements_utils")
    getattr(requirements, "_init_modules_to_packages_map", lambda: None)()


def begin_anew() -> None:
    """Makes again what MLflow made for its process when it was imported: for one that was forked from that."""
    with contextlib.suppress(ModuleNotFoundError):
        telemetry: Any = importlib.import_module("mlflow.telemetry.client")
        telemetry.set_telemetry_client()


def longest_seconds(environment: Mapping[str, str]) -> float:
    """How long a request may take."""
    return float(environment.get(_TIMEOUT_VARIABLE) or _TIMEOUT_SECONDS)


def parse(document: dict[str, Any], model: Any) -> Parsed:
    """What a JSON object means to a model. Takes `params` out of it, as MLflow does."""
    schema = model.metadata.get_input_schema()
    if (tensors := _tensors(document, schema, model.metadata)) is not None:
        return Parsed(tensors, document.get("params"), is_unwrapped=False)
    # Private, but the one place that knows which bodies are unwrapped; the public way leads to `predict` only.
    return Parsed(*_server._parse_json_data(document, model.metadata, schema))  # noqa: SLF001


def is_unwrapped(document: dict[str, Any]) -> bool:
    """Whether an object is a body of the kind that LLM APIs take."""
    return bool(_server.is_unified_llm_input(document))


def answer_other(body: bytes, content_type: str, model: Any) -> Other:
    """Everything that is no JSON object: CSV, Parquet, and what is refused. `model` has `metadata` and `predict`."""
    return Other(*_server.invocations(body, content_type, model, model.metadata.get_input_schema()))


def jsonable(predictions: Any) -> Any:
    """Tables and arrays as lists; everything else as it is."""
    return _json_rules._get_jsonable_obj(predictions, pandas_orient="records")  # noqa: SLF001


def to_json(value: Any) -> str:
    """The text of a value as MLflow's server writes it. Raises TypeError or ValueError."""
    return json.dumps(value, cls=_json_rules.NumpyEncoder)


def simpler(value: Any) -> Any:
    """For a value that JSON does not know, one that it knows. Raises TypeError."""
    return _encoder.default(value)


def status(error: RefusedError) -> int:
    """The HTTP status of a refusal, as MLflow's server has it."""
    return int(error.get_http_status_code())  # type: ignore[no-untyped-call]


def enforces_nothing_but_a_schema(model: Any) -> bool:
    """Whether what a frame goes through, before the model gets it, depends on the schema of the inputs alone."""
    metadata = model.metadata
    return not (_says(metadata, "_is_signature_from_type_hint") or _says(metadata, "_is_type_hint_from_example"))


def without_input_schema(model: Any) -> Any:
    """The same model for inputs that are as its schema wants them; `params` are still enforced."""
    metadata = copy.copy(model.metadata)
    signature = metadata.signature
    params, outputs = signature.params, signature.outputs
    # A signature of nothing is not allowed.
    metadata.signature = ModelSignature(outputs=outputs, params=params) if params or outputs else None
    other = copy.copy(model)
    other._model_meta = metadata  # noqa: SLF001 - if MLflow kept it elsewhere, it would go on checking
    return other


def predict(model: Any, data: Any, params: Any) -> Any:
    """The predictions of a model. Raises RefusedError when the data do not fit, ModelError when the model fails."""
    try:
        with model_at_work():
            return model.predict(data, params=params)
    except RefusedError:
        raise
    except Exception as error:
        raise ModelError("") from error


def predict_stream(model: Any, parsed: Parsed) -> Iterator[Any]:
    """The chunks that a model gives. Raises what the model raises."""
    chunks: Iterator[Any] = model.predict_stream(parsed.data, params=parsed.params)
    return chunks


def _tensors(document: dict[str, Any], schema: Any, metadata: Any) -> Any:
    """`inputs` as arrays, where MLflow's way differs in nothing but a copy of the whole beforehand; else None."""
    data = document.get("inputs")
    if type(data) is not list or not data or type(data[0]) is dict or is_unwrapped(document):
        return None
    if len(FORMATS & document.keys()) != 1 or _says(metadata, "_is_signature_from_type_hint"):
        return None
    if schema is None or not schema.is_tensor_spec() or len(schema.inputs) != 1:
        return None
    try:
        array = np.array(data, dtype=schema.inputs[0].type)
    except Exception:  # MLflow finds it again, and words it
        return None
    return {schema.inputs[0].name: array} if schema.has_input_names() else array


def _says(metadata: Any, claim: str) -> bool:
    return bool(getattr(metadata, claim, bool)())
