"""An answer does not tell what exists where its caller may not look: over REST, on the three services as they run (S8).

How long the answers take is compared in test_timing.py.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from servicekit import context
from serving_service import store
from tessera.secrets.v1 import secrets_pb2
from tessera.serving.v1 import serving_pb2
from tests.support.http import fetch
from tests.support.platform import Platform, running_platform
from tests.support.secrecy import NAME, Asked, assert_alike, requests_about

PRESENT, MISSING = "present", "missing"
SECRETS = "/api/2.0/secrets"
VERSIONS = "/api/2.0/tessera/secrets"
KEY = {"scope": "Shop", "key": NAME}

READS = [
    Asked("GET", f"{SECRETS}/get?scope=Shop&key={NAME}"),
    Asked("GET", f"{VERSIONS}/versions/list?scope=Shop&key={NAME}"),
]
WRITES = [
    Asked("POST", f"{SECRETS}/put", {**KEY, "string_value": "v"}),
    Asked("POST", f"{SECRETS}/put", {**KEY, "string_value": "v", "if_version": 0}),
    Asked("POST", f"{SECRETS}/put", {**KEY, "string_value": "v", "if_version": 7}),
    Asked("POST", f"{SECRETS}/delete", KEY),
    Asked("POST", f"{VERSIONS}/restore", {**KEY, "version": 1}),
    Asked("POST", f"{VERSIONS}/purge", KEY),
]
ACLS = [
    Asked("GET", f"{SECRETS}/acls/get?scope=Shop&principal={NAME}"),
    Asked("POST", f"{SECRETS}/acls/put", {"scope": "Shop", "principal": NAME, "permission": "READ"}),
    Asked("POST", f"{SECRETS}/acls/delete", {"scope": "Shop", "principal": NAME}),
]

ENDPOINTS = requests_about(serving_pb2.DESCRIPTOR.services_by_name["ServingEndpoints"], "name", served_model_name="one")
BODIES: dict[str, Any] = {
    "UpdateServingEndpointConfig": {"served_entities": [{"entity_name": "ready", "entity_version": "1"}]},
}
INVOCATIONS = [
    Asked("POST", f"/serving-endpoints/{NAME}/invocations", {"inputs": [1]}),
    Asked("POST", f"/serving-endpoints/{NAME}/served-models/one/invocations", {"inputs": [1]}),
]


@pytest.fixture(scope="module")
async def platform() -> AsyncIterator[Platform]:
    async with running_platform(tokens_per_minute=0) as running:
        await running.introduce("bob", "carol")  # a plain user, and one who may READ the scope
        admin = running.secrets.admin
        await admin.create_user(PRESENT)
        await admin.create_scope("Shop")
        await admin.grant("Shop", "carol", secrets_pb2.READ)
        await admin.put("Shop", PRESENT, "value")
        await admin.grant("Shop", PRESENT, secrets_pb2.READ)
        await running.endpoints_of("admin").create(PRESENT, None)
        yield running


@pytest.mark.parametrize("asked", [*READS, *WRITES], ids=str)
async def test_without_permission_keys_that_exist_and_others_are_refused_alike(
    platform: Platform, asked: Asked
) -> None:
    await assert_alike(platform.url, asked, PRESENT, MISSING, token=platform.tokens["bob"], status=403)
    assert await platform.secrets.admin.keys("Shop") == [PRESENT]


@pytest.mark.parametrize("asked", WRITES, ids=str)
async def test_reader_who_writes_is_refused_alike(platform: Platform, asked: Asked) -> None:
    await assert_alike(platform.url, asked, PRESENT, MISSING, token=platform.tokens["carol"], status=403)


@pytest.mark.parametrize("asked", ACLS, ids=str)
async def test_without_manage_principals_that_are_granted_something_and_others_are_refused_alike(
    platform: Platform, asked: Asked
) -> None:
    await assert_alike(platform.url, asked, PRESENT, MISSING, token=platform.tokens["bob"], status=403)


@pytest.mark.parametrize("rpc", ENDPOINTS)
async def test_endpoint_without_permission_is_one_that_does_not_exist(platform: Platform, rpc: str) -> None:
    asked = replace(ENDPOINTS[rpc], body=BODIES.get(rpc, ENDPOINTS[rpc].body))
    await assert_alike(platform.url, asked, PRESENT, MISSING, token=platform.tokens["bob"], status=404)


async def test_endpoint_is_not_read_for_somebody_who_may_not_see_it(
    platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def watched(find: Any) -> Any:
        def reading(connection: Any, which: str) -> Any:
            if context.current() is not None:  # the workers of endpoints read them too, for nobody
                read.append(which)
            return find(connection, which)

        return reading

    for name in ("endpoint_named", "endpoint_with_id"):
        monkeypatch.setattr(store, name, watched(getattr(store, name)))
    path = f"/api/2.0/serving-endpoints/{PRESENT}"
    assert (await fetch(platform.url, "GET", path, token=platform.tokens["bob"])).status == 404
    assert read == []
    assert (await fetch(platform.url, "GET", path, token=platform.tokens["admin"])).status == 200
    assert len(read) == 1


@pytest.mark.parametrize("asked", INVOCATIONS, ids=str)
async def test_invoking_an_endpoint_without_permission_is_invoking_none(platform: Platform, asked: Asked) -> None:
    await assert_alike(platform.url, asked, PRESENT, MISSING, token=platform.tokens["bob"], status=404)


async def test_lists_leave_out_what_one_may_not_see(platform: Platform) -> None:
    answer = await fetch(platform.url, "GET", "/api/2.0/serving-endpoints", token=platform.tokens["bob"])
    assert answer.json() == {"endpoints": []}


async def test_answers_that_differ_are_found(platform: Platform) -> None:
    for asked, status in ((READS[0], 200), (ACLS[0], 200), (ENDPOINTS["GetServingEndpoint"], 200)):
        with pytest.raises(AssertionError):
            await assert_alike(platform.url, asked, PRESENT, MISSING, token=platform.tokens["admin"], status=status)
