"""KServe around a pyfunc model, in its own process: `python kserve_program.py MODEL PORT`.

V1 protocol: `POST /v1/models/bench:predict` with `instances`.
"""

from __future__ import annotations

import sys
from typing import Any

import mlflow.pyfunc
import numpy as np
import uvicorn
from kserve import Model, ModelServer


class OnLoopback(uvicorn.Config):
    """KServe would listen on every interface, and has no option for another."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{**options, "host": "127.0.0.1"})


class Pyfunc(Model):
    """The model of one folder."""

    def __init__(self, folder: str) -> None:
        super().__init__("bench")
        self._model = mlflow.pyfunc.load_model(folder)
        self.ready = True

    def predict(self, payload: Any, headers: Any = None, response_headers: Any = None) -> Any:
        return {"predictions": self._model.predict(np.asarray(payload["instances"], dtype=float)).tolist()}


if __name__ == "__main__":
    uvicorn.Config = OnLoopback  # type: ignore[misc]
    ModelServer(http_port=int(sys.argv[2]), workers=1, enable_grpc=False, access_log_format=None).start(
        [Pyfunc(sys.argv[1])]
    )
