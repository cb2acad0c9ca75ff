"""`python -m tests.differential.asking SIZE MODEL...`: asks MLflow's scoring server and ours the same, in this process.

Writes, for each model and case, a line of JSON with both answers. A process of its own, because no test process
imports mlflow.
"""

import asyncio
import contextlib
import json
import logging
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import jsonschema
import mlflow.tracing
from mlflow.pyfunc import scoring_server

from serving_service import mlmodel, openapi
from serving_service.model_server import mlflow_rules
from serving_service.model_server.application import Application
from serving_service.model_server.scoring import Scoring
from tests.differential import corpus, models
from tests.differential.corpus import Case
from tests.support.json_bodies import bodies


async def ask(app: Any, case: Case) -> tuple[int, str]:
    """Status and body of the answer of an ASGI application."""
    headers = [] if case.content_type is None else [(b"content-type", case.content_type.encode())]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": "/invocations",
        "raw_path": b"/invocations",
        "query_string": b"",
        "headers": headers,
    }
    answers: list[Any] = []
    pending = [{"type": "http.request", "body": case.body}]
    forever = asyncio.Event()

    async def receive() -> Any:
        if not pending:
            await forever.wait()
        return pending.pop()

    async def send(message: Any) -> None:
        answers.append(message)

    await app(scope, receive, send)
    return answers[0]["status"], b"".join(each.get("body", b"") for each in answers).decode("utf-8", "surrogateescape")


def lenient(app: Any) -> Any:
    """MLflow's application, which raises after some of its answers."""

    async def answer(*args: Any) -> None:
        with contextlib.suppress(Exception):
            await app(*args)

    return answer


def described(path: Path) -> list[Case]:
    """Bodies that the description of a model shows; none for a model that has no signature."""
    signature = mlmodel.read(path)
    if signature is None:
        return []
    document = json.loads(openapi.document("e", "/serving-endpoints/e", 1, {"m": signature}))
    content = document["paths"]["/served-models/m/invocations"]["post"]["requestBody"]["content"]
    schema = content["application/json"]["schema"]
    made = bodies(schema)
    assert made
    for body in made:
        jsonschema.validate(body, schema, jsonschema.Draft202012Validator)
    return [Case(body=json.dumps(body).encode(), is_described=True) for body in made]


async def compare(name: str, cases: list[Case]) -> None:
    """Asks both servers for the answers of one model."""
    with tempfile.TemporaryDirectory() as folder:
        path = models.saved(name, Path(folder))
        model = mlflow_rules.load(str(path))
        theirs = lenient(scoring_server.init(model))
        ours = Application(Scoring(model).answer, threads=1, seconds=60, version="")
        for case in [*cases, *described(path)]:
            if not case.models or name in case.models:
                record = {
                    "model": name,
                    "content_type": case.content_type,
                    "body": case.body.decode("latin-1"),
                    "is_described": case.is_described,
                    "theirs": await ask(theirs, case),
                    "ours": await ask(ours, case),
                }
                sys.stdout.write(json.dumps(record) + "\n")


def main(size: int, names: list[str]) -> None:
    """Compares the models of these names."""
    warnings.simplefilter("ignore")  # what MLflow says while saving, and pandas while guessing at dates
    logging.disable()
    mlflow.tracing.disable()
    cases = corpus.cases(size)
    for kind in models.ANSWERS:
        for document in ({"dataframe_records": [{"kind": kind}]}, {"messages": [], "kind": kind}):
            cases.append(Case(body=json.dumps(document).encode(), models=("answers",)))
    for name in names:
        asyncio.run(compare(name, cases))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
