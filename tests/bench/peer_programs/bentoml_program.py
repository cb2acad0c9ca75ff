"""BentoML around a pyfunc model, in its own processes: `python bentoml_program.py MODEL PORT`.

`POST /predict` with `{"data": [[...]]}`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import bentoml
import mlflow.pyfunc
import numpy as np


@bentoml.service(workers=1, traffic={"timeout": 60}, logging={"access": {"enabled": False}})
class Bench:
    """The model of the folder that the environment names."""

    def __init__(self) -> None:
        self._model = mlflow.pyfunc.load_model(os.environ["BENCH_MODEL"])

    @bentoml.api
    def predict(self, data: list) -> list:  # type: ignore[type-arg]
        return self._model.predict(np.asarray(data, dtype=float)).tolist()  # type: ignore[no-any-return]


if __name__ == "__main__":
    os.environ["BENCH_MODEL"] = sys.argv[1]
    os.chdir(Path(__file__).parent)
    bentoml.serve("bentoml_program:Bench", host="127.0.0.1", port=int(sys.argv[2]), blocking=True)
