"""MLServer around a pyfunc model, in its own process: `python mlserver_program.py MODEL PORT`.

V2 protocol: `POST /v2/models/bench/infer` with one tensor.
"""

from __future__ import annotations

import asyncio
import os
import sys

import mlflow.pyfunc
from mlserver import MLModel, MLServer, ModelSettings, Settings
from mlserver.codecs import NumpyCodec
from mlserver.settings import ModelParameters
from mlserver.types import InferenceRequest, InferenceResponse


class Pyfunc(MLModel):
    """The model of the folder that its parameters name."""

    async def load(self) -> bool:
        self._model = mlflow.pyfunc.load_model(self.settings.parameters.uri)
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        answer = self._model.predict(NumpyCodec.decode_input(payload.inputs[0]))
        return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output("predictions", answer)])


async def main(model: str, port: int) -> None:
    settings = Settings(
        host="127.0.0.1",
        http_port=port,
        grpc_port=port + 1,
        metrics_port=port + 2,
        parallel_workers=0,
        debug=False,
        metrics_endpoint=None,
        environment_variables={},
    )
    server = MLServer(settings)
    named = ModelSettings(name="bench", implementation=Pyfunc, parameters=ModelParameters(uri=model))
    await server.start([named])


if __name__ == "__main__":
    os.environ.setdefault("MLSERVER_LOGGING_SETTINGS", "")
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
