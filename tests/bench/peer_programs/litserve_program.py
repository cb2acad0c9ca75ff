"""LitServe around a pyfunc model, in its own processes: `python litserve_program.py MODEL PORT`.

`POST /predict` with `{"data": [[...]]}`.
"""

from __future__ import annotations

import sys
from typing import Any

import litserve
import mlflow.pyfunc
import numpy as np


class Pyfunc(litserve.LitAPI):  # type: ignore[misc]
    """The model of the folder on the command line."""

    def setup(self, device: Any) -> None:
        self._model = mlflow.pyfunc.load_model(sys.argv[1])

    def decode_request(self, request):  # type: ignore[no-untyped-def]  # it would take the annotation for a parameter
        return np.asarray(request["data"], dtype=float)

    def predict(self, x: Any) -> Any:
        return self._model.predict(x)

    def encode_response(self, output: Any) -> Any:
        return {"predictions": output.tolist()}


if __name__ == "__main__":
    server = litserve.LitServer(Pyfunc(), accelerator="cpu", workers_per_device=1)
    server.run(
        host="127.0.0.1", port=int(sys.argv[2]), num_api_servers=1, generate_client_file=False, log_level="error"
    )
