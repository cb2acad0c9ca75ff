"""Models that were logged with packages of their own, on a whole platform: built once, kept, and told about."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.api import ENDPOINTS, Api
from tests.support.registered_models import (
    INSTALLABLE,
    NOT_INSTALLABLE,
    PACKAGED_MODEL,
    entity,
    fingerprint,
    stack_environment,
)
from tests.support.sockets import short_directory
from tests.support.stack import Stack, clean_environment, running_stack
from tests.support.wheels import index_variables, make_wheel, runner_wheels, variables_file

DEPLOY_SECONDS = 180.0
KEY = {"OPENAI_API_KEY": "{{secrets/scope/key}}"}


@pytest.fixture(scope="module")
def wheels() -> Iterator[Path]:
    with short_directory() as folder:
        make_wheel(folder, "tiny", "1.0")
        yield folder


@pytest.fixture(scope="module")
def stack(wheels: Path) -> Iterator[Stack]:
    file = variables_file(wheels / "helpers.env", index_variables(wheels, runner_wheels()))
    with running_stack(environment=stack_environment(TESSERA_REGISTRY_ENV_FILE=str(file))) as running:
        yield running


@pytest.fixture(scope="module")
def api(stack: Stack) -> Api:
    api = Api(stack.url, stack.token)
    api.create_scope("scope")
    api.put_secret("scope", "key", "first value")
    return api


def environments(stack: Stack) -> dict[str, int]:
    """The environments of a platform, and when each came about."""
    folder = stack.data_dir / "serving" / "environments"
    return {path.name: path.lstat().st_ctime_ns for path in folder.iterdir()}


def phases(api: Api, name: str, phase: str) -> list[tuple[str, str]]:
    """How each launch of an endpoint got through a phase: outcome and message."""
    events = api.call("GET", f"/api/2.0/tessera/serving-endpoints/{name}/events")["events"]
    return [(event["outcome"], event["message"]) for event in events if event["phase"] == phase]


def command(stack: Stack, *arguments: str) -> str:
    """What the command line prints, which ends by itself."""
    environment = {**clean_environment(), "DATABRICKS_HOST": stack.url, "DATABRICKS_TOKEN": stack.token}
    program = [sys.executable, "-P", "-m", "tessera.cli", *arguments]
    ran = subprocess.run(program, env=environment, capture_output=True, text=True, check=True, timeout=DEPLOY_SECONDS)
    return ran.stdout


def test_a_model_runs_in_what_it_was_logged_with_and_nothing_makes_it_be_built_again(
    stack: Stack, api: Api, wheels: Path
) -> None:
    served = entity(INSTALLABLE, name="one", model=PACKAGED_MODEL, **KEY)
    api.create_endpoint("packaged", served)
    followed = command(stack, "logs", "packaged", "--build", "--follow")
    assert followed == api.build_logs("packaged", "one")
    api.deployed("packaged", within=DEPLOY_SECONDS)
    version, prefix, key = api.ask("packaged", "package:tiny", "prefix:", "fingerprint:OPENAI_API_KEY")
    (name,) = environments(stack)
    assert version == "1.0"
    assert Path(prefix) == stack.data_dir / "serving" / "environments" / name / "venv"
    assert key == fingerprint("first value")
    logs = api.build_logs("packaged", "one")
    assert "tiny is not installed" in logs
    assert "+ tiny==1.0" in logs
    assert f"Built environment {name}" in logs
    assert phases(api, "packaged", "ENVIRONMENT_BUILD") == [("SUCCEEDED", "")]

    # Neither other variables nor another value of a secret, and no index either.
    before = environments(stack)
    (wheels / "tiny-1.0-py3-none-any.whl").rename(wheels / "away")
    shutil.rmtree(stack.data_dir / "serving" / "packages")
    api.put_secret("scope", "key", "second value")
    api.update_endpoint("packaged", {**served, "environment_vars": {**KEY, "MORE": "more"}})
    api.deployed("packaged", within=DEPLOY_SECONDS)
    assert api.ask("packaged", "package:tiny", "fingerprint:OPENAI_API_KEY", "fingerprint:MORE") == [
        "1.0", fingerprint("second value"), fingerprint("more")
    ]  # fmt: skip
    assert environments(stack) == before
    assert f"Environment {name} was built before" in api.build_logs("packaged", "one", config_version=2)
    assert api.refused("GET", f"{ENDPOINTS}/packaged/served-models/one/build-logs?config_version=1")[0] == 404

    api.call("POST", f"{ENDPOINTS}/packaged/config:stop")
    assert f"Environment {name} was built before" in api.build_logs("packaged", "one")
    api.delete_endpoint("packaged")


def test_a_package_that_is_nowhere_is_named_as_the_cause_and_in_the_build_log(stack: Stack, api: Api) -> None:
    before = environments(stack) if (stack.data_dir / "serving" / "environments").exists() else {}
    api.create_endpoint("incomplete", entity(NOT_INSTALLABLE, name="one", model=PACKAGED_MODEL))
    failed = api.failed("incomplete")["pending_config"]["served_entities"][0]["state"]
    cause = failed["deployment_state_message"]
    assert failed["deployment"] == "DEPLOYMENT_FAILED"
    assert cause.startswith("Phase environment build failed: Because no-such-package was not found")
    assert phases(api, "incomplete", "ENVIRONMENT_BUILD") == [("FAILED", cause)]
    logs = api.build_logs("incomplete", "one", config_version=1)
    assert "Requirement no-such-package==1.0" in logs
    assert logs.rstrip("\n").endswith(cause)
    assert environments(stack).keys() == before.keys()
    api.delete_endpoint("incomplete")


def test_models_that_need_nothing_else_share_the_services_environment(api: Api) -> None:
    api.create_endpoint("plain", entity("1", name="one"))
    api.deployed("plain")
    assert "nothing is built" in api.build_logs("plain", "one")
    assert api.ask("plain", "prefix:") == [sys.prefix]
    api.delete_endpoint("plain")
