"""Somebody who logs models with packages that the platform does not have: in an environment of their own, which uv
makes out of the real package index. That needs the network; without it, whoever asks is told what is missing."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import uv

from serving_service.buildenv import BuildDelayed, failure
from tests.support.stack import clean_environment

PANDAS = "2.2.3"
"""Another version than any that the platform is installed with."""

VERSIONED_MODEL = "versioned-model"
"""Answers which version of pandas it runs with, and with which value of the variable ANSWER."""

CHAIN_MODEL = "chain-model"
"""MLflow's flavour `langchain`: a chain that asks a provider that speaks OpenAI's protocol."""

_INDEX_VARIABLES = {"PIP_INDEX_URL": "UV_DEFAULT_INDEX", "PIP_EXTRA_INDEX_URL": "UV_INDEX"}
_INSTALL_SECONDS = 600

_CHAIN = """
import mlflow
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI

prompt = ChatPromptTemplate.from_messages([("system", "Be brief."), ("human", "{question}")])
# Key and address are in the environment.
mlflow.models.set_model(prompt | ChatOpenAI(model="asked", max_retries=0) | StrOutputParser())
"""

_LOG = """
import sys
from importlib import metadata

import mlflow
import mlflow.langchain
import mlflow.pyfunc
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, Schema

folder, versioned, chain = sys.argv[1:]


class Versioned(mlflow.pyfunc.PythonModel):
    def predict(self, context, model_input, params=None):
        import os

        import pandas

        return [f"{pandas.__version__} {os.environ.get('ANSWER', '')}".strip()] * len(model_input)


mlflow.set_tracking_uri(f"sqlite:///{folder}/registry.db")
mlflow.set_registry_uri(f"sqlite:///{folder}/registry.db")
experiment = mlflow.create_experiment("author", artifact_location=f"{folder}/artifacts")
with mlflow.start_run(experiment_id=experiment):
    mlflow.pyfunc.log_model(
        name=versioned,
        python_model=Versioned(),
        pip_requirements=[f"pandas=={metadata.version('pandas')}"],
        registered_model_name=versioned,
    )
with mlflow.start_run(experiment_id=experiment):
    mlflow.langchain.log_model(
        f"{folder}/chain.py",
        name=chain,
        signature=ModelSignature(inputs=Schema([ColSpec("string", "question")])),
        pip_requirements=[f"{each}=={metadata.version(each)}" for each in ("langchain", "langchain-openai")],
        registered_model_name=chain,
    )
"""


class IndexAwayError(Exception):
    """The package index does not answer."""


@dataclass(frozen=True)
class Author:
    """A folder with an environment and a registry, in which both models are."""

    folder: Path

    @property
    def registry_uri(self) -> str:
        return f"sqlite:///{self.folder}/registry.db"


def index_variables() -> dict[str, str]:
    """Where packages come from on this machine, as uv is told: what its own variables say, or those of pip."""
    own = {name: value for name, value in os.environ.items() if name.startswith("UV_")}
    pips = {uvs: os.environ[pips] for pips, uvs in _INDEX_VARIABLES.items() if pips in os.environ}
    return {**pips, **own}


def author(folder: Path) -> Author:
    """Makes the environment and logs both models; raises IndexAwayError."""
    python = folder / "venv" / "bin" / "python"
    _uv(folder, "venv", "--quiet", "--no-project", str(folder / "venv"))
    ours = [f"{name}=={metadata.version(name)}" for name in ("mlflow-skinny", "sqlalchemy", "alembic")]
    wanted = [*ours, f"pandas=={PANDAS}", "langchain>=1,<2", "langchain-openai>=1,<2"]
    _uv(folder, "pip", "install", "--quiet", "--only-binary", ":all:", "--python", str(python), *wanted)
    (folder / "chain.py").write_text(_CHAIN)
    (folder / "log.py").write_text(_LOG)
    logged = subprocess.run(
        [python, "-P", folder / "log.py", folder, VERSIONED_MODEL, CHAIN_MODEL],
        # A chain wants a key to be loaded, and is loaded when it is logged.
        env={**clean_environment(), "OPENAI_API_KEY": "not-a-real-key"},
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert logged.returncode == 0, logged.stderr
    return Author(folder)


def _uv(folder: Path, *arguments: str) -> None:
    done = subprocess.run(
        [uv.find_uv_bin(), *arguments, "--no-config", "--color", "never"],
        env={**clean_environment(), **index_variables(), "UV_CACHE_DIR": str(folder / "cache")},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=_INSTALL_SECONDS,
    )
    if done.returncode != 0:
        cause = failure(done.stderr, f"uv ended with status {done.returncode}")
        if isinstance(cause, BuildDelayed):
            raise IndexAwayError(str(cause))
        raise AssertionError(done.stderr)
