"""Which secrets reach a model, and who must be allowed what for it: checked when asked for, and again at launch."""

from __future__ import annotations

import base64
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.api import ENDPOINTS, SECRETS, Api, until
from tests.support.registered_models import BETTER, GOOD, entity, fingerprint, stack_environment
from tests.support.stack import running_stack

SECRET = "secrets-rules-secret"


@pytest.fixture(scope="module")
def admin() -> Iterator[Api]:
    with running_stack(environment=stack_environment()) as stack:
        admin = Api(stack.url, stack.token)
        admin.create_scope("rules")
        admin.put_secret("rules", "key", SECRET)
        yield admin


def message_of(api: Api, name: str) -> str:
    """What is said about the first entity of the active configuration."""
    return str(api.endpoint(name)["config"]["served_entities"][0]["state"]["deployment_state_message"])


def body(name: str, **variables: str) -> Any:
    return {"name": name, "config": {"served_entities": [entity(GOOD, name="one", **variables)]}}


def test_creator_needs_read_at_create_at_every_update_and_at_every_launch(admin: Api) -> None:
    admin.create_scope("guarded")
    admin.put_secret("guarded", "api-key", SECRET)
    alice = admin.new_user("alice@example.com")
    wanted = body("alices", OPENAI_API_KEY="{{secrets/guarded/api-key}}")

    status, code, message = alice.refused("POST", ENDPOINTS, wanted)
    assert (status, code) == (403, "PERMISSION_DENIED")
    for named in ("alice@example.com", "READ", "guarded", "api-key", "OPENAI_API_KEY"):
        assert named in message
    assert alice.refused("GET", f"{ENDPOINTS}/alices")[0] == 404

    admin.grant("guarded", "alice@example.com", "READ")
    alice.call("POST", ENDPOINTS, wanted)
    alice.deployed("alices")
    question = ("pid", "fingerprint:OPENAI_API_KEY")
    running = alice.ask("alices", *question)
    assert running[1] == fingerprint(SECRET)

    admin.withdraw("guarded", "alice@example.com")
    again = {"served_entities": wanted["config"]["served_entities"]}
    # Not the caller's rights count but the creator's: an admin cannot lend hers.
    for caller in (alice, admin):
        status, code, message = caller.refused("PUT", f"{ENDPOINTS}/alices/config", again)
        assert (status, code) == (403, "PERMISSION_DENIED")
        assert "alice@example.com" in message
        assert "guarded" in message
    found = alice.deployed("alices")
    assert found["config"]["config_version"] == 1
    assert alice.ask("alices", *question) == running

    # Looked at again at every launch: the value is not handed out on an old permission.
    os.kill(int(running[0]), signal.SIGKILL)
    until(
        lambda: "READ permission on scope guarded" in message_of(alice, "alices"), within=30, what="the cause is told"
    )
    assert alice.endpoint("alices")["state"]["ready"] == "NOT_READY"
    admin.grant("guarded", "alice@example.com", "READ")
    alice.deployed("alices")
    assert alice.ask("alices", "fingerprint:OPENAI_API_KEY") == [fingerprint(SECRET)]
    alice.delete_endpoint("alices")


@pytest.mark.parametrize("group_right", ["READ", "MANAGE"])
def test_right_of_a_group_is_the_right_of_its_members(admin: Api, group_right: str) -> None:
    user = admin.new_user(f"member-{group_right}@example.com")
    scope = f"shared-{group_right}"
    admin.create_scope(scope)
    wanted = body(f"by-{group_right}", OPENAI_API_KEY=f"{{{{secrets/{scope}/nothing}}}}")
    assert user.refused("POST", ENDPOINTS, wanted)[0] == 403
    admin.grant(scope, "users", group_right)
    # Allowed now, and so told that there is no such key.
    assert user.refused("POST", ENDPOINTS, wanted)[:2] == (400, "INVALID_PARAMETER_VALUE")


def test_missing_key_is_no_news_to_somebody_who_may_not_list_the_scope(admin: Api) -> None:
    user = admin.new_user("curious@example.com")
    answers = [
        user.refused("POST", ENDPOINTS, body("probe", OPENAI_API_KEY=f"{{{{secrets/rules/{key}}}}}"))
        for key in ("key", "nothing")
    ]
    assert answers[0][0] == 403
    assert answers[0] == tuple(part.replace("nothing", "key") if isinstance(part, str) else part for part in answers[1])


def test_secret_and_scope_that_are_missing_are_both_named(admin: Api) -> None:
    variables = {"ONE": "{{secrets/rules/nothing}}", "TWO": "{{secrets/nowhere/key}}", "WELL": "{{secrets/rules/key}}"}
    status, code, message = admin.refused("POST", ENDPOINTS, body("missing", **variables))
    assert (status, code) == (400, "INVALID_PARAMETER_VALUE")
    for named in ("Invalid secret provided", "rules", "nothing", "ONE", "nowhere", "TWO"):
        assert named in message
    assert "WELL" not in message
    assert admin.refused("GET", f"{ENDPOINTS}/missing")[0] == 404


def test_missing_right_wins_over_missing_secret_and_all_are_named(admin: Api) -> None:
    user = admin.new_user("mixed@example.com")
    user.create_scope("mixeds-own")
    variables = {"ONE": "{{secrets/rules/key}}", "TWO": "{{secrets/nowhere/key}}", "THREE": "{{secrets/mixeds-own/no}}"}
    status, code, message = user.refused("POST", ENDPOINTS, body("mixed", **variables))
    assert (status, code) == (403, "PERMISSION_DENIED")
    for named in ("rules", "ONE", "nowhere", "TWO", "mixeds-own", "THREE"):
        assert named in message


def test_nobody_brings_a_secret_into_an_endpoint_whose_creator_may_not_read_it(admin: Api) -> None:
    owner = admin.new_user("owner@example.com")
    owner.create_scope("owners")
    owner.put_secret("owners", "key", SECRET)
    owner.call("POST", ENDPOINTS, {"name": "owned"})
    entities = [entity(GOOD, name="one", OPENAI_API_KEY="{{secrets/owners/key}}")]
    # Admins may read every scope, and are the only others who may update.
    admin.call("PUT", f"{ENDPOINTS}/owned/config", {"served_entities": entities})
    owner.deployed("owned")
    assert owner.ask("owned", "fingerprint:OPENAI_API_KEY") == [fingerprint(SECRET)]
    # The owner may not read `rules`, so nothing of it comes into the owner's endpoint, whoever asks.
    entities = [entity(GOOD, name="one", OPENAI_API_KEY="{{secrets/rules/key}}")]
    for author in (owner, admin):
        status, code, message = author.refused("PUT", f"{ENDPOINTS}/owned/config", {"served_entities": entities})
        assert (status, code) == (403, "PERMISSION_DENIED")
        assert "owner@example.com" in message
    owner.delete_endpoint("owned")


def test_endpoints_of_others_do_not_exist_for_those_who_may_not_see_them(admin: Api) -> None:
    other = admin.new_user("other@example.com")
    admin.call("POST", ENDPOINTS, {"name": "hidden"})
    missing = other.refused("GET", f"{ENDPOINTS}/nothing")
    assert other.refused("GET", f"{ENDPOINTS}/hidden") == tuple(
        part.replace("nothing", "hidden") if isinstance(part, str) else part for part in missing
    )
    config = {"served_entities": [entity(GOOD)]}
    for method, path, sent in (
        ("PUT", f"{ENDPOINTS}/hidden/config", config),
        ("DELETE", f"{ENDPOINTS}/hidden", None),
        ("GET", f"{ENDPOINTS}/hidden/served-models/one/logs", None),
        ("GET", f"{ENDPOINTS}/hidden/served-models/one/build-logs", None),
        ("GET", "/api/2.0/tessera/serving-endpoints/hidden/served-models/one/logs:follow", None),
    ):
        assert other.refused(method, path, sent)[:2] == (404, "RESOURCE_DOES_NOT_EXIST")
    assert other.refused("POST", "/serving-endpoints/hidden/invocations", {})[:2] == (404, "ENDPOINT_NOT_FOUND")
    assert "hidden" not in [endpoint["name"] for endpoint in other.call("GET", ENDPOINTS)["endpoints"]]
    admin.delete_endpoint("hidden")


@pytest.mark.parametrize("value", [b"\xff\xfe", b"a\0b"], ids=["not UTF-8", "NUL"])
def test_secret_that_no_variable_can_hold_is_refused_with_the_cause(admin: Api, value: bytes) -> None:
    stored = {"scope": "rules", "key": f"odd-{value.hex()}", "bytes_value": base64.b64encode(value).decode()}
    admin.call("POST", f"{SECRETS}/put", stored)
    wanted = body("odd", OPENAI_API_KEY=f"{{{{secrets/rules/{stored['key']}}}}}")
    status, code, message = admin.refused("POST", ENDPOINTS, wanted)
    assert (status, code) == (400, "INVALID_PARAMETER_VALUE")
    for named in ("OPENAI_API_KEY", "rules", stored["key"], "UTF-8", "NUL"):
        assert named in message
    assert admin.refused("GET", f"{ENDPOINTS}/odd")[0] == 404


def test_rotated_secret_reaches_the_model_with_the_next_update_and_names_ignore_case(admin: Api) -> None:
    admin.create_scope("Rotating")
    admin.put_secret("Rotating", "Key", "first")
    wanted = entity(GOOD, OPENAI_API_KEY="{{secrets/rotating/KEY}}")
    created = admin.create_endpoint("rotating", wanted)
    # As it was written: whoever compares it with what was sent must not see a difference.
    echoed = created["pending_config"]["served_entities"][0]["environment_vars"]
    assert echoed == {"OPENAI_API_KEY": "{{secrets/rotating/KEY}}"}
    admin.deployed("rotating")
    assert admin.ask("rotating", "fingerprint:OPENAI_API_KEY") == [fingerprint("first")]
    admin.put_secret("Rotating", "Key", "second\n")
    assert admin.ask("rotating", "fingerprint:OPENAI_API_KEY") == [fingerprint("first")]
    admin.update_endpoint("rotating", {**wanted, "entity_version": BETTER})
    admin.deployed("rotating")
    assert admin.ask("rotating", "fingerprint:OPENAI_API_KEY") == [fingerprint("second\n")]

    # Gone by the next launch: that is a failed deployment, and what runs goes on.
    admin.call("POST", f"{SECRETS}/delete", {"scope": "Rotating", "key": "Key"})
    assert admin.ask("rotating", "fingerprint:OPENAI_API_KEY") == [fingerprint("second\n")]
    admin.delete_endpoint("rotating")


def test_whatever_is_not_exactly_one_reference_is_plain_text(admin: Api) -> None:
    literals = {
        "EMBEDDED": "Bearer {{secrets/rules/key}}",
        "SPACED": "{{ secrets/rules/key }}",
        "TWO": "{{secrets/rules/key}}{{secrets/rules/key}}",
        "UPPER": "{{SECRETS/rules/key}}",
        "DEEP": "{{secrets/rules/key/more}}",
        "SHORT": "{{secrets/rules}}",
        "SINGLE": "{secrets/rules/key}",
        "BARE": "secrets/rules/key",
        "NEWLINE": "{{secrets/rules/key}}\n",
        "EMPTY": "",
        "UNICODE": "zażółć 💡",
    }
    created = admin.create_endpoint("literal", entity(GOOD, OPENAI_API_KEY="{{secrets/rules/key}}", **literals))
    echoed = created["pending_config"]["served_models"][0]["environment_vars"]
    assert echoed == {"OPENAI_API_KEY": "{{secrets/rules/key}}", **literals}
    found = admin.deployed("literal")
    assert found["config"]["served_entities"][0]["environment_vars"] == echoed
    questions = [f"fingerprint:{name}" for name in literals]
    assert admin.ask("literal", *questions) == [fingerprint(value) for value in literals.values()]
    assert admin.ask("literal", "fingerprint:OPENAI_API_KEY") == [fingerprint(SECRET)]
    # A configuration replaces the one before as a whole.
    admin.update_endpoint("literal", entity(GOOD))
    found = admin.deployed("literal")
    assert "environment_vars" not in found["config"]["served_entities"][0]
    assert admin.ask("literal", "fingerprint:OPENAI_API_KEY", "fingerprint:BARE") == [fingerprint("")] * 2
    admin.delete_endpoint("literal")
