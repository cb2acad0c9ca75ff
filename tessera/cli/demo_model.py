"""Logs and registers the demo's model, twice; a program of its own because importing mlflow takes seconds.

`python -m tessera.cli.demo_model ARTIFACTS NAME`: the registry is the one that MLFLOW_REGISTRY_URI names.
"""

from __future__ import annotations

import hashlib
import os
import sys
from typing import Any

import mlflow
import mlflow.pyfunc
import pandas

FINGERPRINT_LENGTH = 12


class EnvironmentReader(mlflow.pyfunc.PythonModel):  # type: ignore[misc, name-defined]
    """Answers what its process was given: a fingerprint of the key, never the key."""

    def __init__(self, version: str) -> None:
        self._version = version

    def predict(
        self, context: Any, model_input: pandas.DataFrame, params: dict[str, Any] | None = None
    ) -> list[dict[str, str]]:
        """One answer for each row, whatever stands in it."""
        key = os.environ.get("OPENAI_API_KEY", "")
        answer = {
            "key_fingerprint": hashlib.sha256(key.encode()).hexdigest()[:FINGERPRINT_LENGTH] if key else "",
            "text": os.environ.get("TEXT_ENV_VAR_NAME", ""),
            "version": self._version,
        }
        return [answer for _ in range(len(model_input))]


def main(artifacts: str, name: str) -> None:
    """Registers versions 1 and 2 of the model; `artifacts` is the folder for their files."""
    experiment = mlflow.create_experiment("demo", artifact_location=artifacts)
    for version in ("1", "2"):
        with mlflow.start_run(experiment_id=experiment):
            # No requirements of its own: it runs in the environment of the platform.
            mlflow.pyfunc.log_model(
                name=name, python_model=EnvironmentReader(version), pip_requirements=[], registered_model_name=name
            )


if __name__ == "__main__":
    main(*sys.argv[1:])
