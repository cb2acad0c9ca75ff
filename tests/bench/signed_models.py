"""`python -m tests.bench.signed_models FOLDER`: saves the models of the table `model-server`, one folder each."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import numpy as np
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, Schema, TensorSpec

_SIGNATURES = {
    "frame": ModelSignature(inputs=Schema([ColSpec("double", name) for name in "abc"])),
    "tensor": ModelSignature(inputs=Schema([TensorSpec(np.dtype("float64"), (-1, 3))])),
}


class Doubling(mlflow.pyfunc.PythonModel):  # type: ignore[misc, name-defined]
    """Does as little as a model can do."""

    def predict(self, context: Any, model_input: Any) -> Any:
        return model_input * 2


def main() -> None:
    for name, signature in _SIGNATURES.items():
        path = Path(sys.argv[1]) / name
        mlflow.pyfunc.save_model(path, python_model=Doubling(), signature=signature, pip_requirements=[])


if __name__ == "__main__":
    main()
