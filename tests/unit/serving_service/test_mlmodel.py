"""Reading what a model says of itself, whoever wrote it."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from serving_service import mlmodel, plain_yaml
from serving_service.mlmodel import UnusableSignature, parsed, read

LONG = [{"type": "long", "name": "a", "required": True}]


def a_file(inputs: Any = LONG, *, rest: str = "", **parts: Any) -> bytes:
    """A file as MLflow writes it."""
    said = {"inputs": inputs, "outputs": None, "params": None, **parts}
    lines = [f"  {name}: " + ("null" if value is None else f"'{json.dumps(value)}'") for name, value in said.items()]
    return "\n".join([rest, "signature:", *lines, "type_hint_from_example: false"]).encode()


def test_the_parts_of_a_signature_are_read() -> None:
    outputs, params = [{"type": "double"}], [{"name": "n", "type": "long", "default": 1, "shape": None}]
    found = parsed(a_file(outputs=outputs, params=params))
    assert found is not None
    assert (found.inputs, found.outputs, found.params) == (LONG, outputs, params)
    assert not found.is_from_type_hint


def test_a_text_over_several_lines_is_one() -> None:
    found = parsed(b'signature:\n  inputs: \'[{"type": "long",\n    "name": "it\'\'s"}]\'\n  outputs: null\n')
    assert found is not None
    assert found.inputs == [{"type": "long", "name": "it's"}]


def test_a_type_hint_is_noticed() -> None:
    found = parsed(a_file(rest="is_signature_from_type_hint: true"))
    assert found is not None
    assert found.is_from_type_hint


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"flavors: {}",
        b"signature: null",
        b"signature: {}",
        a_file(None),
        a_file([]),
        b"other:\n  inputs: '[{}]'",
        b"- signature:\n    inputs: '[{}]'",
        b"signature:\n  deeper:\n    inputs: '[{}]'",
    ],
)
def test_a_model_without_a_signature_has_none(text: bytes) -> None:
    assert parsed(text) is None


@pytest.mark.parametrize(
    "text",
    [
        b"\xff\xfe\xff",
        b"signature: [",
        b"signature: {inputs: '[{}]'",
        b"? [signature]\n: x",
        b"? *a\n: x",
        b"a: &a '[{}]'\nsignature:\n  inputs: *a",
        b"a: &a {inputs: '[{}]'}\nsignature: *a",
        b"signature:\n  inputs: 'no JSON'",
        b"signature:\n  inputs: '{}'",
        b"signature:\n  inputs: '[1]'",
        b"signature:\n  inputs: '" + b"[" * 100_000 + b"'",
        b"signature:\n  inputs: '[" + b"9" * 10_000 + b"]'",
        a_file([{"type": "long", "name": "\ud800"}]),
        a_file([{"x": [[]] * mlmodel.MOST_PARTS}]),
        a_file(json.loads('[{"x":' + "[" * mlmodel.DEEPEST + "]" * mlmodel.DEEPEST + "}]")),
        b"x: [" + b"a," * plain_yaml.MOST_EVENTS + b"]",
        b"[" * 500_000,
        b"- " * 400_000,
        b'{"a":' * 150_000,
    ],
    ids=lambda text: repr(text[:24]),
)
def test_what_mlflow_would_not_write_is_refused_at_once(text: bytes) -> None:
    began = time.process_time()
    with pytest.raises(UnusableSignature):
        parsed(text)
    assert time.process_time() - began < 5


def test_yaml_as_deep_as_a_signature_may_be_is_the_deepest() -> None:
    """Its reader takes the longer for each part, the deeper that is."""
    depth = plain_yaml.DEEPEST - 1  # the file itself is the first level
    assert parsed(a_file(rest="x: " + "[" * depth + "]" * depth)) is not None
    with pytest.raises(UnusableSignature, match="deeper"):
        parsed(a_file(rest="x: " + "[" * (depth + 1) + "]" * (depth + 1)))


def test_aliases_of_aliases_are_not_followed() -> None:
    """What doubles with every line would fill the memory of whoever built it."""
    lines = ["a0: &a0 [x]", *(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 60))]
    found = parsed(a_file(rest="\n".join(lines)))
    assert found is not None
    assert found.inputs == LONG


def test_tags_make_no_objects(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    found = parsed(a_file(rest=f"x: !!python/object/apply:os.mkdir ['{trap}']"))
    assert found is not None
    assert not trap.exists()


def test_a_number_that_json_has_no_word_for_is_none() -> None:
    found = parsed(b'signature:\n  inputs: \'[{"type": "long"}]\'\n  params: \'[{"default": NaN}]\'')
    assert found is not None
    assert found.params == [{"default": None}]


def test_the_file_of_a_folder_is_read(tmp_path: Path) -> None:
    (tmp_path / "MLmodel").write_bytes(a_file())
    assert read(tmp_path) == parsed(a_file())


def test_a_file_beyond_the_limit_is_refused(tmp_path: Path) -> None:
    whole = a_file()
    (tmp_path / "MLmodel").write_bytes(b"#" * (mlmodel.MOST_BYTES - len(whole) - 1) + b"\n" + whole)
    assert read(tmp_path) is not None
    (tmp_path / "MLmodel").write_bytes(b"#" * (mlmodel.MOST_BYTES - len(whole)) + b"\n" + whole)
    with pytest.raises(UnusableSignature, match="larger"):
        read(tmp_path)


def test_nothing_but_a_file_is_opened(tmp_path: Path) -> None:
    """A pipe would hold the reader up for ever, and a link leads where its maker may not look."""
    os.mkfifo(tmp_path / "MLmodel")
    with pytest.raises(UnusableSignature):
        read(tmp_path)
    (tmp_path / "MLmodel").unlink()
    (tmp_path / "elsewhere").write_bytes(a_file())
    (tmp_path / "MLmodel").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnusableSignature):
        read(tmp_path)
    (tmp_path / "MLmodel").unlink()
    with pytest.raises(FileNotFoundError):
        read(tmp_path)
