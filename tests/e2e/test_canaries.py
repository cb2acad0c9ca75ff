"""No secret value, token or key is anywhere in clear but where it has to be: a sweep over everything that a platform
writes, starts and answers, at debug level, with failures and crashes on the way."""

from __future__ import annotations

import base64
import contextlib
import gzip
import http.client
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import grpc
import psutil
import pytest

from tessera.cli.__main__ import main
from tessera.secrets.v1 import secrets_pb2, secrets_pb2_grpc
from tests.support.api import ENDPOINTS, SECRETS, Answer, Api, until
from tests.support.canaries import Canary, found_in, found_in_files, found_in_processes
from tests.support.collector import running_collector
from tests.support.issuer import AUDIENCE, Issuer, serving_in_a_thread
from tests.support.receivers import webhook_receiver
from tests.support.registered_models import (
    FAILING,
    GOOD,
    MODEL,
    NOT_INSTALLABLE,
    PACKAGED_MODEL,
    entity,
    stack_environment,
)
from tests.support.stack import Stack, running_stack
from tests.support.wheels import variables_file

ASSERTION_HEADER = base64.b64encode(b'{"alg":"EdDSA"')[:-2].decode()
"""How every assertion of ours begins."""


OWN_METRICS = ("SECRETS", "SERVING", "GATEWAY")
"""Whose own metrics are read, on sockets in the temporary directory."""

MOST_IN_A_TAIL = 10
"""So few records are the end of an audit log."""

TOKEN = "/oidc/v1/token"
JWT_BEARER = "urn:ietf:params:oauth:grant-type:jwt-bearer"
FORM = {"content-type": "application/x-www-form-urlencoded"}


@pytest.fixture
def directory() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="t-", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


class Sweep:
    """A platform under watch: what it answers is kept, and what it leaves behind is searched."""

    def __init__(self, stack: Stack, folders: list[Path]) -> None:
        self.stack = stack
        self.folders = folders
        self.admin = Api(stack.url, stack.token)
        self.canaries = [
            Canary.of("the admin's token", stack.token),
            Canary.of("an assertion", ASSERTION_HEADER),
            Canary.of("the root key", (stack.data_dir / "root.key").read_bytes()),
        ]
        self.answers: list[tuple[str, Answer]] = []
        self.entitled: set[int] = set()
        self.of_helpers: list[Canary] = []
        """What the registry helper and the builder of environments are given, and nobody else."""

    def new(self, name: str) -> Canary:
        canary = Canary.new(name)
        self.canaries.append(canary)
        return canary

    def send(self, method: str, path: str, body: Any = None, *, api: Api | None = None, **more: Any) -> Answer:
        """A request whose answer must not tell."""
        answer = (api or self.admin).send(method, path, body, **more)
        self.answers.append((f"the answer of {method} {path}", answer))
        return answer

    def found(self) -> list[str]:
        """Everything that the platform should not have told until now."""
        lines = []
        for place, answer in self.answers:
            said = answer.body + json.dumps(answer.headers).encode()
            lines += found_in(said, self.canaries, place=place)
        up = psutil.Process(self.stack.process.pid)
        pids = {up.pid, *self.stack.processes(), *(child.pid for child in up.children(recursive=True))}
        helpers = {pid for pid in pids if is_helper(pid)}
        others = [canary for canary in self.canaries if canary not in self.of_helpers]
        lines += found_in_processes(pids, self.canaries, entitled=self.entitled | helpers)
        return lines + found_in_processes(helpers, others, entitled=()) + self.found_in_files()

    def found_in_files(self) -> list[str]:
        # The two files that exist to hold something: each its own, and nothing else.
        allowed = {
            f"the admin's token as raw in {self.stack.data_dir / 'admin.token'}",
            f"the root key as raw in {self.stack.data_dir / 'root.key'}",
        }
        lines = found_in_files(self.folders, self.canaries)
        assert allowed <= set(lines), "the sweep does not find what is there"
        return [line for line in lines if line not in allowed]


def is_helper(pid: int) -> bool:
    """Whether a process is the registry helper, or builds an environment."""
    with contextlib.suppress(psutil.Error):
        command = psutil.Process(pid).cmdline()
        return "serving_service.registry_helper" in command or any(
            part.endswith(("held_in.py", "/uv")) for part in command
        )
    return False


def test_nothing_secret_is_left_anywhere(directory: Path) -> None:
    data, temporary = directory / "data", directory / "tmp"
    temporary.mkdir()
    posting = Canary.new("the secret of the webhook")
    (directory / "webhook").touch(mode=0o600)
    (directory / "webhook").write_text(posting.value)
    of_helpers = [Canary.of(name, secrets.token_hex(16)) for name in ("the registry's token", "the index's password")]
    token, password = (canary.needles[0][1].decode() for canary in of_helpers)
    variables = {
        "MLFLOW_TRACKING_TOKEN": token,
        "UV_DEFAULT_INDEX": f"http://user:{password}@127.0.0.1:9/simple",
        "UV_HTTP_RETRIES": "0",
    }
    with (
        serving_in_a_thread(Issuer()) as issuer,
        webhook_receiver() as receiver,
        running_collector() as collector,
    ):
        # The first attempts fail, so that a notice is seen in the database too.
        receiver.statuses = [500] * 3
        more = {"TESSERA_OIDC_ISSUER": issuer.url, "TESSERA_OIDC_AUDIENCE": AUDIENCE}
        more["TESSERA_OTLP_ENDPOINT"] = collector.address
        more["TESSERA_NOTIFICATION_WEBHOOK_URL"] = receiver.url
        more["TESSERA_NOTIFICATION_WEBHOOK_SECRET_FILE"] = str(directory / "webhook")
        more |= {f"TESSERA_{name}_METRICS_LISTEN": f"unix:{temporary / name}.sock" for name in OWN_METRICS}
        more["TESSERA_REGISTRY_ENV_FILE"] = str(variables_file(directory / "helpers.env", variables))
        environment = stack_environment(TESSERA_LOG_LEVEL="debug", TMPDIR=str(temporary), **more)
        sweep = sweep_everything(data, temporary, environment, issuer, [posting, *of_helpers])
        told = b"".join(f"{headers}".encode() + body for headers, body in receiver.posted)
        assert b"update_failed" in told
        assert b"[secret]" in told
        assert found_in(told, sweep.canaries, place="what was posted") == []
        assert {span.service for span in collector.spans()} == {"gateway", "secrets", "serving"}
        assert found_in(collector.everything(), sweep.canaries, place="the traces") == []
        assert found_in(repr(collector.metadata).encode(), sweep.canaries, place="what the collector was sent") == []


def sweep_everything(
    data: Path, temporary: Path, environment: dict[str, str], issuer: Issuer, of_files: list[Canary]
) -> Sweep:
    """`of_files` are the secrets that stand in files of the platform's own; those of helpers come last."""
    with running_stack(data, environment=environment) as stack:
        sweep = Sweep(stack, [data, temporary])
        sweep.canaries += of_files
        sweep.of_helpers = of_files[1:]
        secret = sweep.new("a secret")
        put_and_get(sweep, secret)
        refused_requests(sweep)
        tokens_of_a_second_user(sweep)
        oauth(sweep, issuer)
        assert sweep.found() == []

        launch(sweep, secret)
        assert sweep.found() == own_metrics(sweep) == []
        failed_launch(sweep)
        failed_build(sweep)
        crash_of_the_model(sweep)
        assert sweep.found() == []
        crash_of_services(sweep)
        audit_logs(sweep)
        assert main(["backup", str(temporary / "backup"), "--data-dir", str(data)]) == 0
        assert sweep.found() == []
        assert stack.stop() == 0
        assert sweep.found_in_files() == []
    return sweep


def audit_logs(sweep: Sweep) -> None:
    """What admins are told of everything that happened, refused and wrong requests included."""
    for log in ("secrets", "serving"):
        seen, after = 0, 0
        while True:
            answer = sweep.send("GET", f"/api/2.0/tessera/audit/{log}?max_results=1000&after={after}")
            records = [json.loads(each) for each in answer.json()["records"]]
            seen += len(records)
            if len(records) < MOST_IN_A_TAIL:
                break  # each question is recorded, so that there is always one more
            after = records[-1]["seq"]
        assert seen > MOST_IN_A_TAIL, f"the log of {log} tells next to nothing"
        assert list((sweep.stack.data_dir / "audit").glob(f"{log}-*.jsonl"))


def put_and_get(sweep: Sweep, secret: Canary) -> None:
    encoded = base64.b64encode(sweep.new("a secret of bytes").value.encode()).decode()
    for method, path, body in (
        ("POST", f"{SECRETS}/scopes/create", {"scope": "scope"}),
        ("POST", f"{SECRETS}/put", {"scope": "scope", "key": "key", "string_value": secret.value}),
        ("POST", f"{SECRETS}/put", {"scope": "scope", "key": "bytes", "bytes_value": encoded}),
        ("GET", f"{SECRETS}/list?scope=scope", None),
    ):
        assert sweep.send(method, path, body).status == 200
    got = sweep.admin.call("GET", f"{SECRETS}/get?scope=scope&key=key")
    assert base64.b64decode(got["value"]).decode() == secret.value


def refused_requests(sweep: Sweep) -> None:
    """Every way to put a secret wrongly: an answer that repeats it would be logged by the client."""
    wrong = sweep.new("a secret in a wrong request").value
    put = {"scope": "scope", "key": "key"}
    quoted = json.dumps(wrong)
    for body in (
        {**put, "string_value": {"value": wrong}},
        {**put, "string_value": [wrong]},
        {**put, "bytes_value": f"{wrong} is no base64"},
        {**put, "string_value": wrong, "bytes_value": base64.b64encode(wrong.encode()).decode()},
        {**put, "string_value": wrong * 5000},
        {"scope": "nowhere", "key": "key", "string_value": wrong},
        {"scope": "scope", "key": "a/b", "string_value": wrong},
    ):
        assert sweep.send("POST", f"{SECRETS}/put", body).status in (400, 404)
    for raw in (f'{{"string_value": {quoted}', f"{quoted}", f'{{"string_value": {quoted}}} x', f"[{quoted}]"):
        assert sweep.send("POST", f"{SECRETS}/put", raw=raw.encode()).status == 400
    variables = {"GOOD_NAME": wrong, "BAD NAME": wrong}
    body = {"name": "refused", "config": {"served_entities": [entity(GOOD, **variables)]}}
    assert sweep.send("POST", ENDPOINTS, body).status == 400


def tokens_of_a_second_user(sweep: Sweep) -> None:
    user = sweep.admin.new_user("second@example.com")
    assert user.token is not None
    sweep.canaries.append(Canary.of("a user's token", user.token))
    # Under an id of its own, so that the answer is recorded for retries.
    own = user.send(
        "POST", "/api/2.0/token/create", {"comment": "mine"}, headers={"x-tessera-request-id": "own"}
    ).json()
    sweep.canaries.append(Canary.of("a user's own token", own["token_value"]))
    for api in (user, Api(sweep.stack.url, own["token_value"])):
        assert sweep.send("GET", "/api/2.0/preview/scim/v2/Me", api=api).status == 200
        assert sweep.send("GET", "/api/2.0/token/list", api=api).status == 200
        assert sweep.send("GET", f"{SECRETS}/get?scope=scope&key=key", api=api).status == 403
        assert sweep.send("GET", "/no/such/path", api=api).status == 404
    basic = base64.b64encode(f"token:{user.token}".encode()).decode()
    by_basic = {"authorization": f"Basic {basic}"}
    nobody = Api(sweep.stack.url, None)
    assert sweep.send("GET", f"{SECRETS}/scopes/list", api=nobody, headers=by_basic).status == 200
    # One character of the check sum is wrong, as it is after a slip of the pen.
    wrong = user.token[:-1] + ("0" if user.token[-1] != "0" else "1")
    sweep.canaries.append(Canary.of("a mistyped token", wrong[:-1]))
    assert sweep.send("GET", f"{SECRETS}/scopes/list", api=Api(sweep.stack.url, wrong)).status == 403
    with grpc.insecure_channel(sweep.stack.secrets_address) as channel:
        secrets_pb2_grpc.SecretsStub(channel).ListScopes(
            secrets_pb2.ListScopesRequest(), metadata=(("authorization", f"Bearer {user.token}"),), timeout=20
        )
    sweep.admin.call("POST", "/api/2.0/token/delete", {"token_id": _any_token_of(sweep.admin)})


def oauth(sweep: Sweep, issuer: Issuer) -> None:
    """Client secrets, access tokens and external tokens, right and wrong ones."""
    robot = sweep.admin.call("POST", "/api/2.0/preview/scim/v2/ServicePrincipals", {"displayName": "robot"})
    credentials = f"/api/2.0/accounts/servicePrincipals/{robot['id']}/credentials/secrets"
    secret = sweep.admin.call("POST", credentials, {})["secret"]
    wrong = secret[:-1] + ("0" if secret[-1] != "0" else "1")
    sweep.canaries += [Canary.of("a client secret", secret), Canary.of("a mistyped client secret", wrong[:-1])]
    assert sweep.send("GET", credentials).status == 200
    form = {"grant_type": "client_credentials", "client_id": robot["applicationId"], "client_secret": secret}
    nobody = Api(sweep.stack.url, None)
    token = _signed(sweep, "an access token", nobody.send("POST", TOKEN, raw=_form(form), headers=FORM))
    for refused in ({"client_secret": wrong}, {"client_id": "another"}, {"scope": "another"}, {"grant_type": secret}):
        assert sweep.send("POST", TOKEN, raw=_form(form | refused), headers=FORM, api=nobody).status in (400, 401)
    details = {
        "type": "workspace_permission",
        "object_type": "serving-endpoints",
        "object_path": f"/serving-endpoints/{'0' * 32}",
        "actions": ["query_inference_endpoint"],
    }
    form = {"grant_type": JWT_BEARER, "assertion": token, "authorization_details": json.dumps([details])}
    bound = _signed(sweep, "a bound token", nobody.send("POST", TOKEN, raw=_form(form), headers=FORM))
    mint = issuer.mint("second@example.com")
    external, forged = mint.token(), mint.token(aud="another")
    sweep.canaries += [Canary.of("an external token", each.split(".")[2]) for each in (external, forged)]
    for credential, status in ((token, 200), (external, 200), (bound, 403), (forged, 403), (secret, 403), (wrong, 403)):
        api = Api(sweep.stack.url, credential)
        assert sweep.send("GET", "/api/2.0/preview/scim/v2/Me", api=api).status == status
        wrong_form = {"grant_type": JWT_BEARER, "assertion": credential, "authorization_details": "x"}
        assert sweep.send("POST", TOKEN, raw=_form(wrong_form), headers=FORM).status == 400
    with grpc.insecure_channel(sweep.stack.secrets_address) as channel:
        for credential in (token, external):
            secrets_pb2_grpc.SecretsStub(channel).ListScopes(
                secrets_pb2.ListScopesRequest(), metadata=(("authorization", f"Bearer {credential}"),), timeout=20
            )


def _form(fields: Mapping[str, str]) -> bytes:
    return urlencode(fields).encode()


def _signed(sweep: Sweep, name: str, answer: Answer) -> str:
    """The token of an answer. Looked for is its signature: how it begins, every assertion does too."""
    assert answer.status == 200
    token = str(answer.json()["access_token"])
    sweep.canaries.append(Canary.of(name, token.split(".")[2]))
    return token


def _any_token_of(api: Api) -> str:
    api.call("POST", "/api/2.0/token/create", {"comment": "to be deleted"})
    listed = api.call("GET", "/api/2.0/token/list")["token_infos"]
    return str(next(token["token_id"] for token in listed if token["comment"] == "to be deleted"))


def launch(sweep: Sweep, secret: Canary) -> None:
    """A model that has the secret, prints all it has, and raises with it; and one that was executed with it."""
    create(sweep, "open", GOOD)
    create(sweep, "executed", GOOD, TZ="UTC")  # a variable that a forked model cannot be given
    for name in ("open", "executed"):
        sweep.admin.deployed(name)
        sweep.entitled.add(int(sweep.admin.ask(name, "pid")[0]))
    assert found_in_processes(sweep.entitled, [secret], entitled=()), "the sweep does not find what is there"
    assert query(sweep, "print-environment") == 200
    assert query(sweep, "raise:OPENAI_API_KEY") == 400
    read_all(sweep, "open")
    logs = sweep.admin.logs("open", "one")
    assert logs.count("[secret]") >= 3
    assert "ValueError" in logs
    follow(sweep, "open", "logs", b"[secret]", count=logs.count("[secret]") + 1)


def follow(sweep: Sweep, name: str, log: str, needle: bytes, *, count: int = 1) -> None:
    """What somebody is told who follows a log, until the needle has been in it so often."""
    path = f"/api/2.0/tessera/serving-endpoints/{name}/served-models/one/{log}:follow"
    with contextlib.closing(http.client.HTTPConnection(sweep.stack.url.removeprefix("http://"), timeout=60)) as line:
        line.request("GET", path, headers={"authorization": f"Bearer {sweep.stack.token}"})
        response = line.getresponse()
        said = response.read1(1 << 20)
        if log == "logs":
            assert query(sweep, "print-environment") == 200
        while said.count(needle) < count:
            said += response.read1(1 << 20)
    sweep.answers.append((f"the answer of GET {path}", Answer(response.status, dict(response.getheaders()), said)))


def own_metrics(sweep: Sweep) -> list[str]:
    """What the services' own metrics should not tell."""
    lines = []
    for name in OWN_METRICS:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.connect(str(sweep.folders[1] / f"{name}.sock"))
            connection.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
            said = b"".join(iter(lambda connection=connection: connection.recv(65_536), b""))  # type: ignore[misc]
        assert b"process_cpu_seconds_total" in said
        lines += found_in(said, sweep.canaries, place=f"the metrics of {name}")
    return lines


def failed_build(sweep: Sweep) -> None:
    """A model whose packages cannot be had, from an index that cannot be reached."""
    create(sweep, "unbuilt", NOT_INSTALLABLE, model=PACKAGED_MODEL)
    until(lambda: "error: " in sweep.admin.build_logs("unbuilt", "one"), within=60, what="the build has failed")
    read_all(sweep, "unbuilt")
    sweep.send("GET", f"{ENDPOINTS}/unbuilt/served-models/one/build-logs")
    follow(sweep, "unbuilt", "build-logs", b"error: ")
    sweep.send("GET", "/api/2.0/tessera/serving-endpoints/unbuilt/events")
    sweep.admin.delete_endpoint("unbuilt")


def create(sweep: Sweep, name: str, version: str, *, model: str = MODEL, **variables: str) -> None:
    served = entity(version, name="one", model=model, OPENAI_API_KEY="{{secrets/scope/key}}", **variables)
    told = {"on_update_failure": ["ada@example.com"]}
    body = {
        "name": name,
        "config": {"served_entities": [served]},
        "email_notifications": told,
        "ai_gateway": {"usage_tracking_config": {"enabled": True}},
    }
    # A registry that has just been started may ask for a retry.
    until(lambda: sweep.send("POST", ENDPOINTS, body).status == 200, within=60, what=f"{name} is created")


def query(sweep: Sweep, question: str) -> int:
    """The status of what the model of `open` is asked."""
    body = {"dataframe_records": [{"ask": question}]}
    return sweep.send("POST", "/serving-endpoints/open/invocations", body).status


def read_all(sweep: Sweep, name: str) -> None:
    """Reads all that the API tells about an endpoint."""
    for path in ("", f"/{name}", f"/{name}/served-models/one/logs", f"/{name}/served-models/one/build-logs"):
        assert sweep.send("GET", f"{ENDPOINTS}{path}").status == 200
    assert b"request_count_total" in sweep.send("GET", f"{ENDPOINTS}/{name}/metrics").body
    for path in ("metrics/history", "usage"):
        assert sweep.send("GET", f"/api/2.0/tessera/serving-endpoints/{name}/{path}").status == 200


def failed_launch(sweep: Sweep) -> None:
    """The model raises with the value in the text, which is its cause of failure."""
    create(sweep, "failing", FAILING)
    found = sweep.admin.failed("failing")
    assert "[secret]" in found["pending_config"]["served_entities"][0]["state"]["deployment_state_message"]
    read_all(sweep, "failing")


def crash_of_the_model(sweep: Sweep) -> None:
    assert query(sweep, "die:OPENAI_API_KEY") == 500
    until(lambda: query(sweep, "version") == 200, within=60, what="the model is back")
    sweep.entitled.add(int(sweep.admin.ask("open", "pid")[0]))
    sweep.admin.deployed("open")
    read_all(sweep, "open")


def crash_of_services(sweep: Sweep) -> None:
    for name in ("serving", "secrets", "gateway"):
        before = sweep.stack.pids()[name]
        os.kill(before, signal.SIGKILL)
        until(lambda old=(name, before): sweep.stack.pids().get(old[0], old[1]) != old[1], within=20, what=name)  # type: ignore[misc]
        until(lambda: _answers(sweep), within=20, what="everything answers again")
    assert len(sweep.admin.ask("open", "pid")) == 1


def _answers(sweep: Sweep) -> bool:
    """Asked of all three; whatever is answered meanwhile is watched too."""
    asked = ("/api/2.0/secrets/get?scope=scope&key=nothing", f"{ENDPOINTS}/open")
    try:
        statuses = [sweep.send("GET", path).status for path in asked]
    except (OSError, http.client.HTTPException):
        return False
    return statuses == [404, 200] and query(sweep, "version") == 200


# The sweep itself: what it does not find when it is there would pass unseen above.


@pytest.mark.parametrize(
    "spelled",
    [
        str.encode,
        lambda text: json.dumps(text).encode(),
        lambda text: quote(text).encode(),
        lambda text: repr(text).encode(),
        lambda text: base64.b64encode(text.encode()),
        lambda text: base64.b64encode(b"x" + text.encode()),
        lambda text: base64.urlsafe_b64encode(b"xy" + text.encode() + b"z"),
        lambda text: text.encode().hex().encode(),
        lambda text: text.encode("utf-16"),
        lambda text: b"padding" + gzip.compress(text.encode()) + b"padding",
        lambda text: gzip.compress(base64.b64encode(text.encode())),
    ],
)
def test_sweep_finds_what_is_planted_in_a_file(directory: Path, spelled: Any) -> None:
    canary, other = Canary.new("planted"), Canary.new("absent")
    (directory / "deep").mkdir()
    (directory / "deep" / "file").write_bytes(b"before " + spelled(canary.value) + b" after")
    found = found_in_files([directory], [canary, other])
    assert found
    assert all(line.startswith("planted as ") and line.split(",")[0].endswith("/deep/file") for line in found)
    assert canary.value not in str(found)


def test_sweep_finds_what_is_planted_in_a_name_and_in_a_process(directory: Path) -> None:
    planted = f"planted-{directory.name}"
    canary = Canary.of("planted", planted)
    (directory / planted).touch()
    assert found_in_files([directory], [canary])
    for arguments, environment in (([planted], {}), ([], {"VARIABLE": planted})):
        program = [sys.executable, "-S", "-c", "print(flush=True); input()", *arguments]
        with subprocess.Popen(program, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            assert found_in_processes([process.pid], [canary], entitled=())
            assert bool(found_in_processes([process.pid], [canary], entitled=[process.pid])) == bool(arguments)
            process.communicate(b"\n")
