"""The clients that people have, unmodified, against a live platform: what they call works, and what fails raises the
class that their users catch."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import warnings
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tests.conformance.conftest import DESCRIBED, SHARED, Live
from tests.support.api import Api
from tests.support.registered_models import BETTER, CHAT_MODEL, FAILING, GOOD, LOAD_FAILURE, MODEL, entity, fingerprint

pytestmark = [
    # The clients leave their connections to the garbage collector.
    pytest.mark.filterwarnings("ignore:unclosed.*socket:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:.*ResourceWarning.*unclosed.*:pytest.PytestUnraisableExceptionWarning"),
]

SECRET = "official-clients-secret"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """For imports: what these libraries say about their own dependencies is nothing that we could mend."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module", autouse=True)
def environment(live: Live) -> Iterator[None]:
    """Nothing of this machine's own configuration plays a part; mlflow reads its credential from here."""
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith(("DATABRICKS_", "MLFLOW_", "OPENAI_")):
                patch.delenv(name)
        patch.setenv("DATABRICKS_CONFIG_FILE", "/nonexistent")
        patch.setenv("DATABRICKS_HOST", live.url)
        patch.setenv("DATABRICKS_TOKEN", live.admin.token or "")
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        yield


@pytest.fixture(scope="module")
def sdk() -> SimpleNamespace:
    with quiet():
        from databricks.sdk import WorkspaceClient, errors
        from databricks.sdk.service import serving, workspace
    return SimpleNamespace(WorkspaceClient=WorkspaceClient, errors=errors, serving=serving, workspace=workspace)


@pytest.fixture(scope="module")
def client(sdk: SimpleNamespace, live: Live) -> Any:
    return sdk.WorkspaceClient(host=live.url, token=live.admin.token)


@pytest.fixture(scope="module")
def mlflow_client(live: Live) -> Any:
    with quiet():
        import mlflow.deployments
    return mlflow.deployments.get_deploy_client("databricks")  # type: ignore[no-untyped-call]


@pytest.fixture(scope="module")
def openai() -> ModuleType:
    with quiet():
        import openai
    return openai


def deployed_config(sdk: SimpleNamespace, name: str, version: str, **variables: str) -> Any:
    served = sdk.serving.ServedEntityInput(
        entity_name=MODEL,
        entity_version=version,
        workload_size="Small",
        scale_to_zero_enabled=True,
        environment_vars=variables or None,
    )
    return sdk.serving.EndpointCoreConfigInput(name=name, served_entities=[served])


# databricks-sdk


def test_sdk_says_more_about_an_endpoint_and_reads_it_back(client: Any, sdk: SimpleNamespace, live: Live) -> None:
    serving, endpoints = sdk.serving, client.serving_endpoints
    wait = endpoints.create(name="sdk-told", route_optimized=True, budget_policy_id="b", description="words")
    created = wait.response
    query = created.data_plane_info.query_info
    assert query.endpoint_url == f"{live.url}/serving-endpoints/sdk-told/invocations"
    assert f"/serving-endpoints/{created.id}" in query.authorization_details
    patched = endpoints.patch("sdk-told", add_tags=[serving.EndpointTag("a", "1"), serving.EndpointTag("b")])
    assert [(tag.key, tag.value) for tag in patched.tags] == [("a", "1"), ("b", None)]
    assert [tag.key for tag in endpoints.patch("sdk-told", delete_tags=["a"]).tags] == ["b"]
    off = serving.AiGatewayUsageTrackingConfig(enabled=False)
    endpoints.put_ai_gateway("sdk-told", usage_tracking_config=off)
    on = serving.AiGatewayUsageTrackingConfig(enabled=True)
    assert endpoints.put_ai_gateway("sdk-told", usage_tracking_config=on).usage_tracking_config == on
    with pytest.raises(sdk.errors.BadRequest, match=r"fallback_config\.enabled"):
        endpoints.put_ai_gateway("sdk-told", fallback_config=serving.FallbackConfig(enabled=True))
    told = serving.EmailNotifications(on_update_failure=["ada@example.com"])
    endpoints.update_notifications("sdk-told", email_notifications=told)
    assert endpoints.put("sdk-told", rate_limits=[]).rate_limits == []
    limits = [
        serving.AiGatewayRateLimit(
            renewal_period=serving.AiGatewayRateLimitRenewalPeriod.MINUTE,
            key=serving.AiGatewayRateLimitKey.USER_GROUP,
            principal="users",
            calls=600,
            tokens=100_000,
        )
    ]
    assert endpoints.put_ai_gateway("sdk-told", usage_tracking_config=off, rate_limits=limits).rate_limits == limits
    found = endpoints.get("sdk-told")
    assert (found.route_optimized, found.description) == (True, "words")
    assert found.ai_gateway.usage_tracking_config == off
    assert found.email_notifications == told
    endpoints.delete("sdk-told")


def test_sdk_hands_out_the_description_of_an_endpoint_as_it_came(client: Any, sdk: SimpleNamespace, live: Live) -> None:
    text = client.serving_endpoints.get_open_api(DESCRIBED).contents.read()
    assert json.loads(text) == live.admin.call("GET", f"/api/2.0/serving-endpoints/{DESCRIBED}/openapi")
    with pytest.raises(sdk.errors.BadRequest, match="signature"):
        client.serving_endpoints.get_open_api(SHARED)


def test_sdk_knows_who_it_is_and_where(client: Any, live: Live) -> None:
    me = client.current_user.me()
    assert me.user_name == "admin"
    assert "admins" in [group.display for group in me.groups]
    assert str(client.get_workspace_id()) == live.workspace_id


def test_sdk_keeps_secrets_of_both_kinds(client: Any, sdk: SimpleNamespace) -> None:
    client.secrets.create_scope("sdk-scope")
    assert "sdk-scope" in [scope.name for scope in client.secrets.list_scopes()]
    client.secrets.put_secret("sdk-scope", "text", string_value=SECRET)
    raw = bytes(range(256))
    client.secrets.put_secret("sdk-scope", "bytes", bytes_value=base64.b64encode(raw).decode())
    listed = {secret.key: secret.last_updated_timestamp for secret in client.secrets.list_secrets("sdk-scope")}
    assert set(listed) == {"text", "bytes"}
    assert all(isinstance(time, int) and time > 10**12 for time in listed.values())
    assert base64.b64decode(client.secrets.get_secret("sdk-scope", "bytes").value) == raw
    assert client.dbutils.secrets.get("sdk-scope", "text") == SECRET
    assert client.dbutils.secrets.getBytes("sdk-scope", "bytes") == raw
    assert "sdk-scope" in [scope.name for scope in client.dbutils.secrets.listScopes()]
    assert [secret.key for secret in client.dbutils.secrets.list("sdk-scope")] == ["bytes", "text"]
    client.secrets.delete_secret("sdk-scope", "bytes")
    client.secrets.delete_scope("sdk-scope")


def test_sdk_manages_access(client: Any, sdk: SimpleNamespace) -> None:
    permission = sdk.workspace.AclPermission
    client.secrets.create_scope("sdk-acls")
    client.secrets.put_acl("sdk-acls", "alice@example.com", permission.READ)
    items = {item.principal: item.permission for item in client.secrets.list_acls("sdk-acls")}
    assert items == {"admin": permission.MANAGE, "alice@example.com": permission.READ}
    assert client.secrets.get_acl("sdk-acls", "alice@example.com").permission == permission.READ
    client.secrets.delete_acl("sdk-acls", "alice@example.com")
    with pytest.raises(sdk.errors.ResourceDoesNotExist):
        client.secrets.get_acl("sdk-acls", "alice@example.com")
    client.secrets.delete_scope("sdk-acls")


def test_sdk_manages_users_and_tokens(client: Any, sdk: SimpleNamespace, live: Live) -> None:
    created = client.users.create(user_name="sdk-user@example.com", display_name="SDK")
    assert client.users.get(created.id).user_name == "sdk-user@example.com"
    # The client asks for pages until one is empty.
    assert "sdk-user@example.com" in [user.user_name for user in client.users.list()]
    found = list(client.users.list(filter='userName eq "sdk-user@example.com"'))
    assert [user.id for user in found] == [created.id]
    first = client.token_management.create_obo_token(application_id="sdk-user@example.com", lifetime_seconds=600)
    user = sdk.WorkspaceClient(host=live.url, token=first.token_value)
    own = user.tokens.create(comment="own", lifetime_seconds=600)
    assert "own" in [token.comment for token in user.tokens.list()]
    user.tokens.delete(own.token_info.token_id)
    assert "own" not in [token.comment for token in user.tokens.list()]


@pytest.fixture(scope="module")
def robot(client: Any) -> Any:
    """A service principal and a client secret of it."""
    principal = client.service_principals.create(display_name="sdk-robot")
    secret = client.service_principal_secrets_proxy.create(principal.id, lifetime="3600s")
    return SimpleNamespace(id=principal.id, client_id=principal.application_id, secret=secret)


def test_sdk_looks_after_client_secrets(client: Any, robot: Any) -> None:
    secrets = client.service_principal_secrets_proxy
    other = secrets.create(robot.id)
    assert (other.status, other.secret[:4]) == ("ACTIVE", "dose")
    listed = {each.id: each for each in secrets.list(robot.id, page_size=1)}
    assert set(listed) == {robot.secret.id, other.id}
    assert listed[other.id].secret_hash == other.secret_hash
    assert listed[other.id].expire_time == other.expire_time
    secrets.delete(robot.id, other.id)
    assert [each.id for each in secrets.list(robot.id)] == [robot.secret.id]


def test_sdk_logs_in_as_a_service_principal(robot: Any, sdk: SimpleNamespace, live: Live) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("DATABRICKS_TOKEN")
        client = sdk.WorkspaceClient(host=live.url, client_id=robot.client_id, client_secret=robot.secret.secret)
        assert client.config.auth_type == "oauth-m2m"
        assert client.current_user.me().user_name == robot.client_id
        assert client.config.oauth_token().expiry is not None
        with pytest.raises(sdk.errors.PermissionDenied):
            client.service_principal_secrets_proxy.create(robot.id)
        wrong = sdk.WorkspaceClient(host=live.url, client_id=robot.client_id, client_secret="dose-wrong")
        with pytest.raises(ValueError, match="invalid_client"):
            wrong.current_user.me()


def test_sdk_gets_a_token_for_one_endpoint_and_it_is_good_for_nothing_else(
    client: Any, sdk: SimpleNamespace, live: Live
) -> None:
    """As the SDK's client of the data plane does it (contract 6.9)."""
    with quiet():
        from databricks.sdk.data_plane import DataPlaneTokenSource
        from databricks.sdk.oauth import Token
    endpoint_id = client.serving_endpoints.get(SHARED).id
    details = json.dumps(
        [
            {
                "type": "workspace_permission",
                "object_type": "serving-endpoints",
                "object_path": f"/serving-endpoints/{endpoint_id}",
                "actions": ["query_inference_endpoint"],
            }
        ]
    )
    source = DataPlaneTokenSource(live.url, lambda: Token(access_token=live.admin.token or ""))
    token = source.token(SHARED, details)  # type: ignore[no-untyped-call]
    bound = Api(live.url, token.access_token)
    answer = bound.send("POST", f"/serving-endpoints/{SHARED}/invocations", {"dataframe_records": [{"ask": "version"}]})
    assert answer.status == 200
    with pytest.raises(sdk.errors.PermissionDenied):
        sdk.WorkspaceClient(host=live.url, token=bound.token).current_user.me()


def test_sdk_queries_the_data_plane_of_a_route_optimized_endpoint(robot: Any, sdk: SimpleNamespace, live: Live) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("DATABRICKS_TOKEN")
        client = sdk.WorkspaceClient(host=live.url, client_id=robot.client_id, client_secret=robot.secret.secret)
        config = deployed_config(sdk, "sdk-direct", GOOD)
        found = client.serving_endpoints.create_and_wait(name="sdk-direct", config=config, route_optimized=True)
        assert found.route_optimized
        answer = client.serving_endpoints_data_plane.query("sdk-direct", dataframe_records=[{"ask": "version"}])
        assert answer.predictions == [GOOD]
        client.serving_endpoints.delete("sdk-direct")


def test_sdk_deploys_queries_updates_and_deletes(client: Any, sdk: SimpleNamespace) -> None:
    client.secrets.create_scope("sdk-serving")
    client.secrets.put_secret("sdk-serving", "key", string_value=SECRET)
    reference = "{{secrets/sdk-serving/key}}"
    endpoints = client.serving_endpoints
    config = deployed_config(sdk, "sdk", GOOD, OPENAI_API_KEY=reference)
    found = endpoints.create_and_wait(name="sdk", config=config, tags=[sdk.serving.EndpointTag(key="team", value="a")])
    assert found.state.ready == sdk.serving.EndpointStateReady.READY
    assert found.state.config_update == sdk.serving.EndpointStateConfigUpdate.NOT_UPDATING
    assert found.permission_level == sdk.serving.ServingEndpointDetailedPermissionLevel.CAN_MANAGE
    served = found.config.served_entities[0]
    assert served.name == f"{MODEL}-{GOOD}"
    assert served.environment_vars == {"OPENAI_API_KEY": reference}
    assert served.state.deployment == sdk.serving.ServedModelStateDeployment.DEPLOYMENT_READY
    assert found.config.served_models[0].model_name == MODEL
    assert found.tags[0].value == "a"
    assert "sdk" in [endpoint.name for endpoint in endpoints.list()]

    answer = endpoints.query("sdk", dataframe_records=[{"ask": "fingerprint:OPENAI_API_KEY"}, {"ask": "version"}])
    assert answer.predictions == [fingerprint(SECRET), GOOD]
    assert answer.served_model_name == served.name
    split = sdk.serving.DataframeSplitInput(columns=["ask"], data=[["version"]])
    assert endpoints.query("sdk", dataframe_split=split).predictions == [GOOD]
    with pytest.raises(sdk.errors.BadRequest, match="error while evaluating the model"):
        endpoints.query("sdk", dataframe_records=[{"ask": "nonsense"}])

    assert f"version {GOOD} loads with [secret]" in endpoints.logs("sdk", served.name).logs
    assert isinstance(endpoints.build_logs("sdk", served.name).logs, str)

    entities = deployed_config(sdk, "sdk", BETTER, OPENAI_API_KEY=reference).served_entities
    found = endpoints.update_config_and_wait("sdk", served_entities=entities)
    assert found.config.config_version == 2
    assert endpoints.query("sdk", dataframe_records=[{"ask": "version"}]).predictions == [BETTER]

    with pytest.raises(sdk.errors.OperationFailed):
        endpoints.update_config_and_wait("sdk", served_entities=deployed_config(sdk, "sdk", FAILING).served_entities)
    found = endpoints.get("sdk")
    assert found.state.ready == sdk.serving.EndpointStateReady.READY
    assert LOAD_FAILURE in found.pending_config.served_entities[0].state.deployment_state_message
    assert endpoints.query("sdk", dataframe_records=[{"ask": "version"}]).predictions == [BETTER]

    endpoints.delete("sdk")
    with pytest.raises(sdk.errors.ResourceDoesNotExist):
        endpoints.get("sdk")
    with pytest.raises(sdk.errors.NotFound):
        endpoints.query("sdk", inputs=[])


def test_sdk_waits_for_nothing_when_there_is_nothing_to_deploy(client: Any, sdk: SimpleNamespace) -> None:
    found = client.serving_endpoints.create_and_wait(name="sdk-bare")
    assert found.state.ready == sdk.serving.EndpointStateReady.NOT_READY
    client.serving_endpoints.delete("sdk-bare")


def test_sdk_raises_the_classes_that_its_users_catch(client: Any, sdk: SimpleNamespace, live: Live) -> None:
    errors = sdk.errors
    client.secrets.create_scope("sdk-errors")
    with pytest.raises(errors.ResourceAlreadyExists, match="Scope sdk-errors already exists!"):
        client.secrets.create_scope("sdk-errors")
    with pytest.raises(errors.ResourceDoesNotExist):
        client.secrets.list_secrets("sdk-no-scope").__next__()
    with pytest.raises(errors.InvalidParameterValue, match="scope"):
        client.secrets.create_scope("bad name")
    with pytest.raises(errors.BadRequest):
        client.secrets.put_secret("sdk-errors", "key")
    with pytest.raises(errors.NotFound):
        client.api_client.do("GET", "/api/2.0/no-such-path")
    with pytest.raises(errors.ResourceAlreadyExists):
        client.serving_endpoints.create(name=SHARED)
    with pytest.raises(errors.InvalidParameterValue, match="name"):
        client.serving_endpoints.create(name="bad name")
    config = deployed_config(sdk, "sdk-none", GOOD)
    config.served_entities[0].entity_name = "no-such-model"
    with pytest.raises(errors.ResourceDoesNotExist, match="no-such-model"):
        client.serving_endpoints.create(name="sdk-none", config=config)
    limit = sdk.serving.RateLimit(calls=1, renewal_period=sdk.serving.RateLimitRenewalPeriod.MINUTE)
    with pytest.raises(errors.InvalidParameterValue, match=r"rate_limits\[1\]\.calls"):
        client.serving_endpoints.create(name="sdk-none", rate_limits=[limit, limit])

    alice = sdk.WorkspaceClient(host=live.url, token=live.people["alice"].token)
    with pytest.raises(errors.PermissionDenied, match=r"User alice@example\.com does not have READ permission"):
        alice.secrets.get_secret("sdk-errors", "key")
    config = deployed_config(sdk, "sdk-none", GOOD, KEY="{{secrets/sdk-errors/key}}")
    with pytest.raises(errors.PermissionDenied, match="sdk-errors"):
        alice.serving_endpoints.create(name="sdk-none", config=config)
    with pytest.raises(errors.PermissionDenied, match="Invalid access token"):
        sdk.WorkspaceClient(host=live.url, token="dapi0123456789abcdef").current_user.me()


def test_sdk_without_a_credential_is_unauthenticated(sdk: SimpleNamespace, live: Live) -> None:
    """As the SDK is used by those who bring their own way to authenticate, and forget to."""
    with quiet():
        from databricks.sdk.core import Config
        from databricks.sdk.credentials_provider import CredentialsStrategy

    class Nothing(CredentialsStrategy):
        def auth_type(self) -> str:
            return "nothing"

        def __call__(self, config: Any) -> Any:
            return dict

    client = sdk.WorkspaceClient(config=Config(host=live.url, credentials_strategy=Nothing()))
    with pytest.raises(sdk.errors.Unauthenticated, match="Credential was not sent"):
        client.secrets.list_scopes().__next__()


# mlflow.deployments


def test_mlflow_creates_in_both_styles_predicts_updates_and_deletes(mlflow_client: Any, live: Live) -> None:
    served = {"served_entities": [entity(GOOD, KEY="plain")], "tags": [{"key": "a", "value": "b"}]}
    with pytest.warns(UserWarning, match="deprecated"):
        created = mlflow_client.create_endpoint(name="mlflow-old", config=served)
    assert created.name == "mlflow-old"
    assert created.state["config_update"] == "IN_PROGRESS"
    config = {"name": "mlflow-new", "config": {"served_entities": [entity(GOOD)]}}
    assert mlflow_client.create_endpoint(config=config).name == "mlflow-new"
    assert {"mlflow-old", "mlflow-new"} <= {endpoint["name"] for endpoint in mlflow_client.list_endpoints()}
    live.admin.deployed("mlflow-old")
    assert mlflow_client.get_endpoint("mlflow-old").tags == [{"key": "a", "value": "b"}]

    inputs = {"dataframe_records": [{"ask": "version"}, {"ask": "fingerprint:KEY"}]}
    assert mlflow_client.predict(endpoint="mlflow-old", inputs=inputs).predictions == [GOOD, fingerprint("plain")]
    mlflow_client.update_endpoint_config("mlflow-old", {"served_entities": [entity(BETTER)]})
    live.admin.deployed("mlflow-old")
    assert mlflow_client.predict(endpoint="mlflow-old", inputs=inputs).predictions == [BETTER, fingerprint("")]
    for name in ("mlflow-old", "mlflow-new"):
        mlflow_client.delete_endpoint(name)
    assert not {"mlflow-old", "mlflow-new"} & {endpoint["name"] for endpoint in mlflow_client.list_endpoints()}


@pytest.mark.parametrize(
    ("call", "status"),
    [
        (lambda client: client.get_endpoint("mlflow-none"), 404),
        (lambda client: client.delete_endpoint("mlflow-none"), 404),
        (lambda client: client.predict(endpoint="mlflow-none", inputs={"inputs": []}), 404),
        (lambda client: client.create_endpoint(config={"name": "bad name", "config": {}}), 400),
        (lambda client: client.create_endpoint(config={"name": SHARED, "config": {"served_entities": []}}), 400),
        (lambda client: client.predict(endpoint=SHARED, inputs={"nonsense": 1}), 400),
        (lambda client: client.update_endpoint_config(SHARED, {"served_entities": [entity("99")]}), 404),
    ],
)
def test_mlflow_raises_http_errors_with_the_documented_status(mlflow_client: Any, call: Any, status: int) -> None:
    with quiet():
        from requests import HTTPError
    with pytest.raises(HTTPError) as raised:
        call(mlflow_client)
    answer: Any = raised.value.response
    assert answer.status_code == status
    assert set(answer.json()) == {"error_code", "message"}


# openai


@pytest.fixture(scope="module")
def chat(live: Live) -> Iterator[Api]:
    """An endpoint with a chat model; its name is a part of the OpenAI paths on purpose."""
    live.admin.create_endpoint("chat", entity("1", model=CHAT_MODEL))
    live.admin.deployed("chat")
    yield live.admin
    live.admin.delete_endpoint("chat")


def test_openai_chats_at_once_and_in_a_stream(openai: ModuleType, chat: Api) -> None:
    with openai.OpenAI(base_url=f"{chat.url}/serving-endpoints", api_key=chat.token) as client:
        messages = [{"role": "user", "content": "hello"}]
        answer = client.chat.completions.create(model="chat", messages=messages)
        assert answer.choices[0].message.content == "You said hello"
        assert answer.usage.total_tokens == 4
        chunks = client.chat.completions.create(model="chat", messages=messages, stream=True)
        assert "".join(chunk.choices[0].delta.content for chunk in chunks) == "You said it"
        with pytest.raises(openai.NotFoundError, match="The given endpoint does not exist"):
            client.chat.completions.create(model="no-chat", messages=messages)
    with (
        openai.OpenAI(base_url=f"{chat.url}/serving-endpoints", api_key="dapi0") as wrong,
        pytest.raises(openai.PermissionDeniedError),
    ):
        wrong.chat.completions.create(model="chat", messages=messages)


def test_streams_of_the_other_clients_agree(chat: Api, client: Any, sdk: SimpleNamespace, mlflow_client: Any) -> None:
    message = {"messages": [{"role": "user", "content": "hello"}]}
    chunks = mlflow_client.predict_stream(endpoint="chat", inputs=message)
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == "You said it"
    said = sdk.serving.ChatMessage(role=sdk.serving.ChatMessageRole.USER, content="hello")
    answer = client.serving_endpoints.query("chat", messages=[said])
    assert answer.choices[0].message.content == "You said hello"


def test_sdk_manages_users_groups_and_service_principals(sdk: SimpleNamespace, client: Any) -> None:
    with quiet():
        from databricks.sdk.service import iam
    added, replaced = iam.PatchOp.ADD, iam.PatchOp.REPLACE
    user = client.users.create(user_name="sdk-person@example.com", display_name="Sdk")
    robot = client.service_principals.create(display_name="sdk-robot")
    group = client.groups.create(display_name="sdk-group", members=[iam.ComplexValue(value=user.id)])
    assert [member.value for member in client.groups.get(group.id).members] == [user.id]
    members = {"members": [{"value": robot.id}]}
    client.groups.patch(group.id, operations=[iam.Patch(op=added, value=members)])
    assert {member.value for member in client.groups.get(group.id).members} == {user.id, robot.id}
    path = f'members[value eq "{user.id}"]'
    client.groups.patch(group.id, operations=[iam.Patch(op=iam.PatchOp.REMOVE, path=path)])
    assert {each.display for each in client.service_principals.get(robot.id).groups} == {"users", "sdk-group"}
    client.users.patch(user.id, operations=[iam.Patch(op=replaced, path="active", value=False)])
    assert not client.users.get(user.id).active
    client.users.update(user.id, user_name="sdk-person@example.com", display_name="Sdk again", active=True)
    [found] = client.users.list(filter='displayName eq "sdk again"', attributes="id,userName")
    assert (found.id, found.user_name, found.display_name) == (user.id, "sdk-person@example.com", None)
    # The client asks for page after page until one is empty.
    assert {"sdk-group", "admins", "users"} <= {each.display_name for each in client.groups.list()}
    assert robot.application_id in {each.application_id for each in client.service_principals.list()}
    with pytest.raises(sdk.errors.NotFound):
        client.users.get("17")
    with pytest.raises(sdk.errors.ResourceConflict):
        client.groups.create(display_name="SDK-GROUP")
    for each, manager in ((user, client.users), (robot, client.service_principals), (group, client.groups)):
        manager.delete(each.id)
        with pytest.raises(sdk.errors.NotFound):
            manager.get(each.id)


def test_sdk_manages_permissions_of_an_endpoint(sdk: SimpleNamespace, client: Any, live: Live) -> None:
    serving = sdk.serving
    levels, entry = serving.ServingEndpointPermissionLevel, serving.ServingEndpointAccessControlRequest
    made = client.serving_endpoints.create("sdk-shared").response
    robot = client.service_principals.create(display_name="sdk-caller")
    token = client.token_management.create_obo_token(robot.application_id, lifetime_seconds=600).token_value
    own = sdk.WorkspaceClient(host=live.url, token=token)
    with pytest.raises(sdk.errors.NotFound):
        own.serving_endpoints.get("sdk-shared")
    granted = client.serving_endpoints.update_permissions(
        made.id,
        access_control_list=[
            entry(service_principal_name=robot.application_id, permission_level=levels.CAN_QUERY),
            entry(group_name="users", permission_level=levels.CAN_VIEW),
        ],
    )
    assert (granted.object_id, granted.object_type) == (f"/serving-endpoints/{made.id}", "serving-endpoint")
    assert own.serving_endpoints.get("sdk-shared").permission_level.value == "CAN_QUERY"
    with pytest.raises(sdk.errors.PermissionDenied, match="CAN_MANAGE"):
        own.serving_endpoints.delete("sdk-shared")
    named = client.serving_endpoints.get_permission_levels(made.id).permission_levels
    assert {each.permission_level for each in named} == set(levels)
    # As Terraform does: the caller under `user_name`, whatever it is.
    me = client.current_user.me().user_name
    client.serving_endpoints.set_permissions(
        made.id, access_control_list=[entry(user_name=me, permission_level=levels.CAN_MANAGE)]
    )
    found = client.serving_endpoints.get_permissions(made.id).access_control_list
    assert [(each.user_name, each.group_name) for each in found] == [(me, None), (None, "admins")]
    assert [held.inherited for each in found for held in each.all_permissions] == [False, True]
    with pytest.raises(sdk.errors.NotFound):
        own.serving_endpoints.get("sdk-shared")
    client.serving_endpoints.delete("sdk-shared")
    client.service_principals.delete(robot.id)


def test_sdk_manages_tokens(sdk: SimpleNamespace, client: Any, live: Live) -> None:
    with quiet():
        from databricks.sdk.common.types.fieldmask import FieldMask
        from databricks.sdk.service import settings
    robot = client.service_principals.create(display_name="sdk-owner")
    made = client.token_management.create_obo_token(robot.application_id, comment="deploys", lifetime_seconds=600)
    own = sdk.WorkspaceClient(host=live.url, token=made.token_value)
    assert own.current_user.me().user_name == robot.application_id
    token = settings.PublicTokenInfo(comment="renamed")
    mask = FieldMask(field_mask=["comment"])  # type: ignore[no-untyped-call]
    own.tokens.update(made.token_info.token_id, token, mask)
    found = client.token_management.get(made.token_info.token_id).token_info
    assert (found.comment, found.created_by_username, found.owner_id) == ("renamed", "admin", int(robot.id))
    assert found.token_id in [each.token_id for each in client.token_management.list(created_by_username="admin")]
    client.token_management.delete(found.token_id)
    with pytest.raises(sdk.errors.NotFound):
        client.token_management.get(found.token_id)
    client.service_principals.delete(robot.id)
