"""MLflow's scoring server and ours are asked the same, and answer the same but for the differences listed here.

One process asks both, in pairs of applications around the same model, so that a difference is one of the servers.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from serving_service.model_server.failures import MODEL_FAILED
from tests.differential import corpus

ROOT = Path(__file__).parents[2]

_GROUPS = (
    ("none", "doubles", "double tensor", "columns", "plain", "tensor", "unnamed", "module", "chat"),
    ("answers", "optional", "plain, optional", "nested", "tensors", "one tensor", "params", "hinted", "responses"),
)
"""The models, for one process each."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One request to one model, with both answers."""

    model: str
    content_type: str | None
    body: str
    is_described: bool
    theirs: tuple[int, str]
    ours: tuple[int, str]

    @property
    def document(self) -> Any:
        """The body as JSON; None when it is none."""
        return _read(self.body)

    @property
    def is_same(self) -> bool:
        """Whether status and predictions are the same, or status and message of an error."""
        if self.theirs[0] != self.ours[0]:
            return False
        if self.ours[0] < 400:
            return _canonical(self.theirs[1]) == _canonical(self.ours[1])
        return _message(self.theirs[1]) == _message(self.ours[1])


DIFFERENCES: dict[str, tuple[str, Callable[[Asked], bool]]] = {
    "stream": (
        "`stream: true` is answered in server-sent events, or refused when the model cannot; theirs cannot stream.",
        lambda asked: (
            isinstance(asked.document, dict)
            and asked.document.get("stream") is True
            and (asked.ours[0] == 400 or (asked.ours[0] == 200 and _is_stream(asked.ours[1])))
        ),
    ),
    "no content type": (
        "A body without a content type is taken for JSON; theirs fails over it.",
        lambda asked: asked.content_type is None and asked.theirs[0] == 500 and asked.ours[0] in (200, 400),
    ),
    "failure of the model": (
        "The documented sentence instead of theirs, and no stack trace.",
        lambda asked: (
            asked.theirs[0] == asked.ours[0] == 400
            and "unexpected error while evaluating the model" in _message(asked.theirs[1])
            and _message(asked.ours[1]) == MODEL_FAILED
        ),
    ),
    "failure of the server": (
        "400 instead of 500: a body or an answer that cannot be handled, or an error that the model calls internal, "
        "is the caller's or the model's doing, and no client should repeat the request.",
        lambda asked: (
            asked.theirs[0] == 500
            and asked.ours[0] == 400
            and _message(asked.ours[1]) in (MODEL_FAILED, _message(asked.theirs[1]))
        ),
    ),
    "UUIDs and enumerations": (
        "They are predictions like any other: orjson knows them. Theirs fails over them.",
        lambda asked: (
            asked.theirs[0] == 500
            and asked.ours[0] == 200
            and any(kind in asked.body for kind in ("identifier", "enumeration"))
        ),
    ),
}
"""Every difference that is kept on purpose: why, and where."""


@pytest.fixture(scope="session")
def everything_asked() -> list[Asked]:
    return _ask_all(corpus.SIZE)


def _ask_all(size: int) -> list[Asked]:
    with ThreadPoolExecutor() as pool:
        return [asked for group in pool.map(lambda names: _ask(size, names), _GROUPS) for asked in group]


def _ask(size: int, models: tuple[str, ...]) -> list[Asked]:
    program = [sys.executable, "-m", "tests.differential.asking", str(size), *models]
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}
    done = subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4_000:]
    records = map(json.loads, done.stdout.splitlines())
    return [Asked(**{**record, "theirs": tuple(record["theirs"]), "ours": tuple(record["ours"])}) for record in records]


def test_both_servers_answer_the_same_but_for_the_listed_differences(everything_asked: list[Asked]) -> None:
    others = [each for each in everything_asked if not (each.is_same or _difference(each))]
    assert others == []


@pytest.mark.long
def test_both_servers_answer_the_same_to_many_more_bodies() -> None:
    assert [each for each in _ask_all(20 * corpus.SIZE) if not (each.is_same or _difference(each))] == []


def test_every_error_is_the_documented_envelope(everything_asked: list[Asked]) -> None:
    errors = [json.loads(each.ours[1]) for each in everything_asked if each.ours[0] >= 400]
    assert {(error["error_code"], *sorted(error)) for error in errors} == {("BAD_REQUEST", "error_code", "message")}
    assert not [error for error in errors if "Traceback" in error["message"] or "canary" in error["message"]]


@pytest.mark.parametrize("name", DIFFERENCES)
def test_a_listed_difference_is_still_one(everything_asked: list[Asked], name: str) -> None:
    assert [each for each in everything_asked if not each.is_same and _difference(each) == name]


def test_a_body_without_a_content_type_is_answered_as_json_is(everything_asked: list[Asked]) -> None:
    typed = {
        (each.model, each.body): each.ours
        for each in everything_asked
        if each.content_type == "application/json; charset=utf-8"
    }
    untyped = [each for each in everything_asked if each.content_type is None]
    assert len({each.model for each in untyped}) == sum(map(len, _GROUPS))
    assert [each for each in untyped if each.ours != typed[each.model, each.body]] == []


def test_the_corpus_is_large_and_asks_every_model_for_predictions(everything_asked: list[Asked]) -> None:
    bodies = {(each.content_type, each.body) for each in everything_asked if each.model == "none"}
    assert len(bodies) > 0.95 * corpus.SIZE
    predicted = [each.model for each in everything_asked if each.ours[0] == 200]
    assert set(predicted) == {name for group in _GROUPS for name in group}
    assert len(predicted) > 1_000


def test_every_body_that_a_description_shows_is_taken(everything_asked: list[Asked]) -> None:
    described = [each for each in everything_asked if each.is_described]
    assert {each.model for each in described} == {name for group in _GROUPS for name in group} - {"none", "answers"}
    refused = [(each.model, each.body, each.ours) for each in described if each.ours[0] != 200]
    # The classes of these two ask more of their optional fields than their signatures say.
    assert [each for each in refused if each[0] not in ("chat", "responses")] == []
    assert {each.model for each in described if each.ours[0] == 200} == {each.model for each in described}


def _difference(asked: Asked) -> str | None:
    return next((name for name, (_, is_it) in DIFFERENCES.items() if is_it(asked)), None)


def _is_stream(text: str) -> bool:
    """Whether it is server-sent events, JSON each, with the usual end."""
    *events, done, rest = text.split("\n\n")
    chunks = [event.removeprefix("data: ") for event in events if event.startswith("data: ")]
    is_whole = (done, rest) == ("data: [DONE]", "") and len(chunks) == len(events) > 0
    return is_whole and None not in map(_read, chunks)


def _read(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _canonical(text: str) -> str:
    try:
        return json.dumps(json.loads(text), sort_keys=True)  # NaN is not equal to itself, but its text is
    except (ValueError, RecursionError):
        return text


def _message(text: str) -> str:
    document = _read(text)
    return str(document["message"]) if isinstance(document, dict) and "message" in document else text
