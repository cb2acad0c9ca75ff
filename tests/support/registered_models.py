"""Models in a registry that every stack of a test run shares, made by one process of its own, so that no test imports
mlflow for them and each version is logged once.

`model-name` answers questions about the process that it runs in, row by row: a secret's fingerprint, never the secret
itself. Its versions differ in how they load. `chat-model` takes and answers OpenAI's chat messages. `signed-model` was
logged with a signature. The other two ask a provider that speaks OpenAI's protocol: `flavoured-model` as MLflow's own
flavour `openai` does, `asking-model` as people write it by hand, streams included.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

MODEL = "model-name"
CHAT_MODEL = "chat-model"
SIGNED_MODEL = "signed-model"
FLAVOURED_MODEL = "flavoured-model"
ASKING_MODEL = "asking-model"
PACKAGED_MODEL = "packaged-model"

GOOD, BETTER, FAILING, WAITING = "1", "2", "3", "4"
"""Versions of `model-name`: two that load, one that raises, one that waits until somebody listens at GATE."""

INSTALLABLE, NOT_INSTALLABLE = "1", "2"
"""Versions of `packaged-model`: logged to need `tiny` 1.0, which is no package of ours, and one that there is not."""

LOAD_FAILURE = "the model cannot work with"


def entity(version: str, *, name: str | None = None, model: str = MODEL, **variables: str) -> dict[str, Any]:
    """A served entity of a request; `name` is left to the platform when it is not given."""
    served: dict[str, Any] = {"entity_name": model, "entity_version": version, "workload_size": "Small"}
    if name is not None:
        served["name"] = name
    if variables:
        served["environment_vars"] = variables
    return served


def fingerprint(value: str) -> str:
    """What a model answers about the value of a variable."""
    return hashlib.sha256(value.encode()).hexdigest()[:16]


@functools.cache
def registry_uri() -> str:
    """The registry; made at the first call, gone with this process."""
    folder = Path(tempfile.mkdtemp(prefix="t-", dir="/tmp"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    # -P: the modules beside this file bear names of the standard library.
    made = subprocess.run([sys.executable, "-P", __file__, str(folder)], capture_output=True, text=True, cwd=folder)
    assert made.returncode == 0, made.stderr
    return _uri(folder)


def stack_environment(**variables: str) -> dict[str, str]:
    """What a stack has to be told in order to use the registry."""
    return {"TESSERA_MODEL_REGISTRY": registry_uri(), **variables}


def _uri(folder: Path) -> str:
    return f"sqlite:///{folder}/registry.db"


def _register(folder: Path) -> None:
    warnings.simplefilter("ignore")
    import mlflow
    import mlflow.openai
    import mlflow.pyfunc
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import Array

    class Witness(mlflow.pyfunc.PythonModel):  # type: ignore[misc, name-defined]
        def __init__(self, version: str, load_failure: str | None = None, waits: bool = False) -> None:
            self.version = version
            self.load_failure = load_failure
            self.waits = waits

        def load_context(self, context: Any) -> None:
            import os
            import socket
            import sys
            import time

            value = os.environ.get("OPENAI_API_KEY", "nothing")
            sys.stdout.write(f"version {self.version} loads with {value}\n")
            if self.load_failure:
                raise RuntimeError(f"{self.load_failure} {value}")
            if self.waits:
                host, _, port = os.environ["GATE"].partition(":")
                while True:
                    with socket.socket() as visitor:
                        if visitor.connect_ex((host, int(port))) == 0:
                            break
                    time.sleep(0.02)

        def predict(self, context: Any, model_input: Any, params: Any = None) -> Any:
            return [self.answer(*question.partition(":")[::2]) for question in model_input["ask"]]

        def answer(self, kind: str, name: str) -> str:
            import hashlib
            import importlib
            import os
            import signal
            import sys

            if kind == "fingerprint":
                return hashlib.sha256(os.environ.get(name, "").encode()).hexdigest()[:16]
            if kind == "print-environment":
                for variable, value in os.environ.items():
                    sys.stdout.write(f"{variable}={value}\n")
                    sys.stderr.write(f"{value!r}\n")
                return str(len(os.environ))
            if kind == "package":
                return str(importlib.import_module(name).VERSION)
            if kind == "raise":
                raise ValueError(f"cannot answer with {os.environ.get(name)}")
            if kind == "die":
                sys.stdout.write(f"dying with {os.environ.get(name)}\n")
                os.kill(os.getpid(), signal.SIGABRT)
            return {"version": self.version, "pid": str(os.getpid()), "prefix": sys.prefix}[kind]

    class Chat(mlflow.pyfunc.PythonModel):  # type: ignore[misc, name-defined]
        def predict(self, context: Any, model_input: Any, params: Any = None) -> Any:
            said = model_input["messages"][-1]["content"]
            choice = {
                "index": 0,
                "message": {"role": "assistant", "content": f"You said {said}"},
                "finish_reason": "stop",
            }
            return {
                "id": "1",
                "object": "chat.completion",
                "created": 1,
                "model": "chat",
                "choices": [choice],
                "usage": {"prompt_tokens": 1, "completion_tokens": 3, "total_tokens": 4},
            }

        def predict_stream(self, context: Any, model_input: Any, params: Any = None) -> Any:
            for word in ("You", " said", " it"):
                choice = {"index": 0, "delta": {"role": "assistant", "content": word}, "finish_reason": None}
                yield {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "chat", "choices": [choice]}

    class Asking(mlflow.pyfunc.PythonModel):  # type: ignore[misc, name-defined]
        def load_context(self, context: Any) -> None:
            import openai

            self.client = openai.OpenAI(max_retries=0)  # key and address are in the environment

        def predict(self, context: Any, model_input: Any, params: Any = None) -> Any:
            return self.ask(model_input, stream=False).to_dict()

        def predict_stream(self, context: Any, model_input: Any, params: Any = None) -> Any:
            for chunk in self.ask(model_input, stream=True):
                yield chunk.to_dict()

        def ask(self, model_input: Any, stream: bool) -> Any:
            return self.client.chat.completions.create(model="asked", messages=model_input["messages"], stream=stream)

    class Signed(mlflow.pyfunc.PythonModel):  # type: ignore[misc, name-defined]
        def predict(self, context: Any, model_input: Any, params: Any = None) -> Any:
            return (model_input["size"] * params["factor"]).astype("float64")

    columns = [ColSpec("double", "size"), ColSpec("datetime", "since"), ColSpec("string", "note", required=False)]
    signed = ModelSignature(
        inputs=Schema([*columns, ColSpec(Array("long"), "counts")]),
        outputs=Schema([ColSpec("double", "size")]),
        params=ParamSchema([ParamSpec("factor", "double", 2.0)]),
    )

    mlflow.set_tracking_uri(_uri(folder))
    mlflow.set_registry_uri(_uri(folder))
    experiment = mlflow.create_experiment("tests", artifact_location=str(folder / "artifacts"))
    # In the order of the versions' numbers: a registry counts from 1.
    witnesses = (Witness(GOOD), Witness(BETTER), Witness(FAILING, LOAD_FAILURE), Witness(WAITING, waits=True))
    models: list[tuple[str, Any, Any, list[str]]] = [(MODEL, witness, None, []) for witness in witnesses]
    models += [(CHAT_MODEL, Chat(), None, []), (ASKING_MODEL, Asking(), None, []), (SIGNED_MODEL, Signed(), signed, [])]
    for version, package in ((INSTALLABLE, "tiny==1.0"), (NOT_INSTALLABLE, "no-such-package==1.0")):
        models.append((PACKAGED_MODEL, Witness(version), None, [package, f"mlflow-skinny=={mlflow.__version__}"]))
    for name, model, signature, needs in models:
        with mlflow.start_run(experiment_id=experiment):
            mlflow.pyfunc.log_model(
                name=name,
                python_model=model,
                signature=signature,
                pip_requirements=needs,
                registered_model_name=name,
            )
    with mlflow.start_run(experiment_id=experiment):
        mlflow.openai.log_model(
            model="flavoured",
            task="chat.completions",
            name=FLAVOURED_MODEL,
            messages=[{"role": "system", "content": "Be brief."}],
            pip_requirements=[],
            registered_model_name=FLAVOURED_MODEL,
        )


if __name__ == "__main__":
    # Nothing of another platform or registry plays a part.
    for _name in [name for name in os.environ if name.startswith(("MLFLOW_", "DATABRICKS_"))]:
        del os.environ[_name]
    _register(Path(sys.argv[1]))
