"""A real MLflow model, made by a process of its own, so that no test process ever imports mlflow.

`python tests/support/mlflow_models.py FOLDER` saves it. Its answers prove what its process was given: each row is the
fingerprint of one environment variable, never the value.
"""

import hashlib
import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path


def fingerprint(value: str) -> str:
    """What the model answers instead of a value."""
    return hashlib.sha256(value.encode()).hexdigest()[:16]


def save_model(folder: Path) -> Path:
    """Saves the model below `folder` and returns where."""
    path = folder / "model"
    made = subprocess.run([sys.executable, "-P", __file__, str(path)], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    return path


def model_of(program: Path, folder: Path) -> Path:
    """A model in `folder` that is a program: the model server loads its file, whose `_load_pyfunc` never returns."""
    (folder / "code").mkdir(parents=True)
    shutil.copy(program, folder / "code")
    flavor = {"loader_module": program.stem, "code": "code", "python_version": platform.python_version()}
    (folder / "MLmodel").write_text(json.dumps({"flavors": {"python_function": flavor}}))
    return folder


def _save(path: str) -> None:
    import os
    import time
    from collections.abc import Iterator
    from typing import Any

    import mlflow.pyfunc

    class Fingerprints(mlflow.pyfunc.PythonModel):  # type: ignore[misc, name-defined]
        """Row by row: the fingerprint of the variable named, or slowness or a failure on demand."""

        def load_context(self, context: Any) -> None:
            sys.stdout.write(f"loaded with {os.environ.get('OPENAI_API_KEY')}\n")

        def predict(self, context: Any, model_input: Any, params: dict[str, Any] | None = None) -> list[str]:
            names = list(model_input["name"])
            if "slow" in names:
                sys.stdout.write("slow predict begins\n")
                time.sleep(1)
            if "fail" in names:
                raise RuntimeError(f"cannot answer {names}")
            return [hashlib.sha256(os.environ.get(name, "").encode()).hexdigest()[:16] for name in names]

        def predict_stream(
            self, context: Any, model_input: Any, params: dict[str, Any] | None = None
        ) -> Iterator[dict[str, Any]]:
            for number, message in enumerate(model_input["messages"]):
                if message["content"] == "fail":
                    raise RuntimeError(f"cannot answer {message}")
                yield {"number": number, "content": message["content"]}

    # By value, because the replica that loads it knows nothing of this file.
    mlflow.pyfunc.save_model(path, python_model=Fingerprints(), pip_requirements=[])


if __name__ == "__main__":
    _save(sys.argv[1])
