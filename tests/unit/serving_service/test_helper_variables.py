"""Which variables helper processes get, from which file, and that nobody reads them in a text."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from servicekit.errors import StartError
from serving_service.helper_variables import HelperVariables

SERVICE = {"PATH": "/bin", "HOME": "/h", "SSL_CERT_FILE": "/ca.pem", "OPENAI_API_KEY": "k", "LD_PRELOAD": "x"}
OWN = {"PATH": "/bin", "HOME": "/h", "SSL_CERT_FILE": "/ca.pem"}
RETRIES = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2"}


def a_file(path: Path, text: str, mode: int = 0o600) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


def read(path: Path | None, **service: str) -> HelperVariables:
    return HelperVariables(path, service_environment={**SERVICE, **service})


def test_each_helper_gets_its_part_of_the_file_and_little_else(tmp_path: Path) -> None:
    text = """
# the registry
export MLFLOW_TRACKING_TOKEN="a token = #1"
AWS_SECRET_ACCESS_KEY='s3'

UV_DEFAULT_INDEX=https://user:password@example.com/simple
https_proxy=http://proxy
EMPTY=
"""
    variables = read(a_file(tmp_path / "env", text))
    proxy = {"https_proxy": "http://proxy"}
    assert variables.for_registry() == {
        **RETRIES, **OWN, **proxy, "MLFLOW_TRACKING_TOKEN": "a token = #1", "AWS_SECRET_ACCESS_KEY": "s3", "EMPTY": ""
    }  # fmt: skip
    assert variables.for_packages() == {
        **OWN, **proxy, "UV_DEFAULT_INDEX": "https://user:password@example.com/simple"
    }  # fmt: skip


def test_credentials_in_the_services_own_environment_go_nowhere_and_are_said_to(
    caplog: pytest.LogCaptureFixture,
) -> None:
    variables = read(None, AWS_SECRET_ACCESS_KEY="canary", MLFLOW_TRACKING_TOKEN="canary")
    assert variables.for_registry() == {**RETRIES, **OWN}
    assert variables.for_packages() == OWN
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.__dict__["variables"] == ["AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_TOKEN"]
    assert "canary" not in str(record.__dict__)


@pytest.mark.parametrize(
    ("text", "mode", "problem"),
    [
        ("A=1\n", 0o644, "mode 0644"),
        ("A=1\ncanary\n", 0o600, "no NAME=value in line 2"),
        ("A B=canary", 0o600, "line 1"),
        ("A=1\n" * 100_000, 0o600, "larger than 256 KiB"),
    ],
)
def test_a_file_that_is_not_as_it_should_be_keeps_the_service_from_starting(
    tmp_path: Path, text: str, mode: int, problem: str
) -> None:
    with pytest.raises(StartError, match=problem) as caught:
        read(a_file(tmp_path / "env", text, mode))
    assert "canary" not in str(caught.value)


def test_a_file_that_is_not_there_keeps_the_service_from_starting(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="does not exist"):
        read(tmp_path / "nothing")


def test_a_changed_file_is_read_again_and_a_broken_one_is_not_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = a_file(tmp_path / "env", "TOKEN=first-value\n")
    variables = read(path)
    assert not variables.refresh()
    a_file(path, "TOKEN=second-value-2\n")
    assert variables.refresh()
    assert variables.for_registry()["TOKEN"] == "second-value-2"
    path.chmod(0o644)
    assert not variables.refresh()
    assert "stay as they were" in caplog.text
    path.unlink()
    assert not variables.refresh()
    assert variables.for_registry()["TOKEN"] == "second-value-2"
    os.replace(a_file(tmp_path / "new", "TOKEN=third-value\n"), path)  # noqa: PTH105
    assert variables.refresh()
    assert variables.redacted("second-value-2 third-value") == "second-value-2 [secret]"


def test_texts_are_shown_without_what_the_file_holds(tmp_path: Path) -> None:
    url = "https://user:p%40ss-of-index@example.com/simple"
    variables = read(a_file(tmp_path / "env", f"TOKEN=tok-123456\nUV_DEFAULT_INDEX={url}\nON=1\n"))
    shown = variables.redacted(f"tok-123456 at {url}: user:p@ss-of-index and p%40ss-of-index got 401")
    assert "ss-of-index" not in shown
    assert "tok-123456" not in shown
    assert shown.endswith("got 401")
