"""Each RPC says exactly one thing about who may reach it."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf.descriptor import MethodDescriptor

from servicekit.exposure import GRPC_ONLY, REST, exposure, internal
from tests.support.descriptors import ProtoFile


def a_method(**options: Any) -> MethodDescriptor:
    file = ProtoFile()
    file.message("Nothing")
    file.rpc("Service", "Do", "Nothing", "Nothing", **options)
    return file.build().services_by_name["Service"].methods_by_name["Do"]


def test_each_way_to_expose_an_rpc_is_read() -> None:
    assert exposure(a_method(http=[{"get": "/a"}])) == REST
    assert exposure(a_method(grpc_only=True)) == GRPC_ONLY
    assert exposure(a_method(internal_to=["serving", "gateway"])) == internal("gateway", "serving")


def test_rpc_that_says_nothing_is_refused_by_name() -> None:
    method = a_method()
    with pytest.raises(ValueError, match=rf"RPC {method.full_name} needs exactly one of .* it says nothing"):
        exposure(method)


@pytest.mark.parametrize(
    "options",
    [
        {"http": [{"get": "/a"}], "grpc_only": True},
        {"http": [{"get": "/a"}], "internal_to": ["serving"]},
        {"grpc_only": True, "internal_to": ["serving"]},
    ],
)
def test_rpc_that_says_several_things_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"it says public .* and "):
        exposure(a_method(**options))
