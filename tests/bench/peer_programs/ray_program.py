"""Ray Serve around a pyfunc model, in its own processes: `python ray_program.py MODEL PORT`.

`POST /` with `{"data": [[...]]}`. It starts a cluster of one node, and ends it with itself.
"""

from __future__ import annotations

import signal
import sys
from typing import Any

import mlflow.pyfunc
import numpy as np
import ray
from ray import serve
from starlette.requests import Request


@serve.deployment(
    num_replicas=1,
    ray_actor_options={"num_cpus": 0},
    max_ongoing_requests=100,
    logging_config={"enable_access_log": False},
)
class Pyfunc:
    """The model of one folder."""

    def __init__(self, folder: str) -> None:
        self._model = mlflow.pyfunc.load_model(folder)

    async def __call__(self, request: Request) -> Any:
        body = await request.json()
        return {"predictions": self._model.predict(np.asarray(body["data"], dtype=float)).tolist()}


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(0))
    ray.init(include_dashboard=False, configure_logging=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[2])})
    serve.run(Pyfunc.bind(sys.argv[1]), name="bench", route_prefix="/")
    try:
        signal.pause()
    finally:
        ray.shutdown()
