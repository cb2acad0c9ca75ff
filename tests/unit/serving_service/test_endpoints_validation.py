"""What a configuration may say: each rule at its limit and one past it, and what the refusal names."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf.struct_pb2 import Struct

from servicekit.errors import FeatureDisabled, InvalidParameter
from serving_service import configs, gpus
from serving_service.gpus import Machine
from serving_service.model import EndpointConfig, Route
from tessera.serving.v1 import serving_pb2 as pb
from tests.support.builders import NOW, a_config_input, an_input

BARE = Machine()
"""A machine without any GPU."""


def read(message: pb.EndpointCoreConfigInput, *, at: str = "config", machine: Machine = BARE) -> EndpointConfig:
    return configs.read_config(message, at=at, version=3, author="maker@example.com", now=NOW, machine=machine)


@pytest.mark.parametrize("name", ["a", "A-b_9", "x" * 63, "pt", "databricks"])
def test_endpoint_names_that_are_allowed(name: str) -> None:
    configs.check_create(pb.CreateServingEndpointRequest(name=name))


@pytest.mark.parametrize("name", ["", "x" * 64, "a b", "a/b", "a.b", "é", "a\n", "databricks-x", "{{secrets/a/b}}"])
def test_endpoint_names_that_are_refused(name: str) -> None:
    with pytest.raises(InvalidParameter, match=r"^name: "):
        configs.check_create(pb.CreateServingEndpointRequest(name=name))


def test_a_create_request_that_is_too_long_is_refused() -> None:
    with pytest.raises(InvalidParameter, match=r"^config: .* more than the limit of 262144"):
        configs.check_create(pb.CreateServingEndpointRequest(name="demo", description="x" * 262_144))


def test_features_that_are_switched_off_are_accepted() -> None:
    read(a_config_input(an_input(burst_scaling_enabled=False)))


def test_defaults_are_filled_in() -> None:
    config = read(a_config_input(an_input("main.ml.churn", version="7")))
    (entity,) = config.entities
    assert (entity.name, entity.workload_size, entity.workload_type) == ("churn-7", "Small", "CPU")
    assert (entity.creator, entity.created_at, config.version) == ("maker@example.com", NOW, 3)
    assert config.routes == (Route("churn-7", 100),)


def test_everything_that_was_given_is_kept_as_it_was_given() -> None:
    given = an_input(
        name="mine",
        environment_vars={"B": "{{secrets/S/K}}", "A": " plain "},
        instance_profile_arn="arn:aws:iam::1:instance-profile/p",
        workload_type=pb.CPU_LARGE,
        scale_to_zero_enabled=True,
        min_provisioned_concurrency=0,
        max_provisioned_concurrency=8,
    )
    (entity,) = read(a_config_input(given)).entities
    assert entity.environment == {"B": "{{secrets/S/K}}", "A": " plain "}
    assert entity.instance_profile_arn.startswith("arn:")
    assert (entity.workload_size, entity.workload_type, entity.scale_to_zero) == ("", "CPU_LARGE", True)
    assert (entity.min_concurrency, entity.max_concurrency) == (0, 8)


@pytest.mark.parametrize(
    ("entity", "field"),
    [
        (an_input(""), "entity_name"),
        (an_input(version=""), "entity_version"),
        (an_input(name="a b"), "name"),
        (an_input(name="x" * 256), "name"),
        (an_input("a model"), "name"),
        (an_input(workload_size="Huge"), "workload_size"),
        (an_input(workload_size="small"), "workload_size"),
        (an_input(workload_type=pb.GPU_SMALL), "workload_type"),
        (an_input(workload_type=pb.MULTIGPU_MEDIUM), "workload_type"),
        (an_input(workload_type=99), "workload_type"),
        (an_input(workload_size="Small", min_provisioned_concurrency=4), "workload_size"),
        (an_input(workload_size="Small", max_provisioned_concurrency=4), "workload_size"),
        (an_input(min_provisioned_concurrency=2), "min_provisioned_concurrency"),
        (an_input(min_provisioned_concurrency=-4), "min_provisioned_concurrency"),
        (an_input(max_provisioned_concurrency=6), "max_provisioned_concurrency"),
        (an_input(max_provisioned_concurrency=0), "max_provisioned_concurrency"),
        (an_input(min_provisioned_concurrency=8, max_provisioned_concurrency=4), "max_provisioned_concurrency"),
        (an_input(environment_vars={"1": "x"}), "environment_vars"),
        (an_input(environment_vars={"PATH": "x"}), "environment_vars"),
    ],
)
def test_a_bad_entity_is_refused_by_the_path_of_its_field(entity: pb.ServedEntityInput, field: str) -> None:
    message = a_config_input(an_input(name="first"), entity, routes=[("first", 100)])
    with pytest.raises(InvalidParameter) as caught:
        read(message)
    assert caught.value.message.startswith(f"config.served_entities[1].{field}: ")


def test_kinds_with_gpus_are_allowed_where_there_are_so_many() -> None:
    four = Machine(has_driver=True, devices=tuple("abcd"))
    entity = read(a_config_input(an_input(workload_type=pb.MULTIGPU_MEDIUM)), machine=four).entities[0]
    assert entity.workload_type == "MULTIGPU_MEDIUM"
    with pytest.raises(
        InvalidParameter, match=r"GPU_XLARGE_8 takes 8 GPUs, and this machine has 4\. Use one of CPU, GPU"
    ):
        read(a_config_input(an_input(workload_type=pb.GPU_XLARGE_8)), machine=four)
    with pytest.raises(InvalidParameter, match=r"workload_type: this kind of machine is not offered here"):
        read(a_config_input(an_input(workload_type=99)), machine=four)


def test_which_gpus_are_seen_is_declared_by_nobody_where_there_are_any() -> None:
    message = a_config_input(an_input(environment_vars={gpus.VISIBLE: ""}))
    assert read(message).entities[0].environment == {gpus.VISIBLE: ""}
    with pytest.raises(
        InvalidParameter, match=r"^config\.served_entities\[0\]\.environment_vars: CUDA_VISIBLE_DEVICES"
    ):
        read(message, machine=Machine(has_driver=True))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("external_model", Struct()),
        ("min_provisioned_throughput", 0),
        ("max_provisioned_throughput", 100),
        ("provisioned_model_units", 50),
        ("burst_scaling_enabled", True),
    ],
)
def test_features_that_are_not_offered_are_refused_in_an_entity(field: str, value: Any) -> None:
    with pytest.raises(FeatureDisabled, match=rf"^served_entities\[0\].{field}: "):
        read(a_config_input(an_input(**{field: value})), at="")


def test_inference_tables_are_refused() -> None:
    with pytest.raises(FeatureDisabled, match=r"^config\.auto_capture_config\.enabled: "):
        read(a_config_input(an_input(), auto_capture_config=pb.AutoCaptureConfig(enabled=True)))


def test_inference_tables_that_are_switched_off_are_kept_as_they_were_given() -> None:
    assert read(a_config_input(an_input())).auto_capture is None
    off = pb.AutoCaptureConfig(catalog_name="main", enabled=False)
    assert read(a_config_input(an_input(), auto_capture_config=off)).auto_capture == {
        "catalog_name": "main",
        "enabled": False,
    }


def test_ten_entities_are_allowed_and_none_or_eleven_are_not() -> None:
    entities = [an_input(name=f"e{number}") for number in range(11)]
    read(a_config_input(*entities[:10], routes=[(f"e{number}", 10) for number in range(10)]))
    for wrong in ([], entities):
        with pytest.raises(InvalidParameter, match=r"^config\.served_entities: "):
            read(a_config_input(*wrong))


def test_two_entities_of_one_name_are_refused() -> None:
    with pytest.raises(InvalidParameter, match=r"^config\.served_entities\[1\]\.name: 'churn-1' is used twice"):
        read(a_config_input(an_input(), an_input()))


@pytest.mark.parametrize(
    ("routes", "named"),
    [
        ([], r"config\.traffic_config\.routes: "),
        ([("a", 100)], r"config\.traffic_config\.routes: served entity 'b' has no route"),
        ([("a", 50), ("b", 49)], r"config\.traffic_config\.routes: .* add up to 99"),
        ([("a", 100), ("b", 100)], r"config\.traffic_config\.routes: .* add up to 200"),
        ([("a", 100), ("c", 0)], r"config\.traffic_config\.routes\[1\]\.served_entity_name: .*'a', 'b'"),
        ([("a", 50), ("a", 50)], r"config\.traffic_config\.routes\[1\]\.served_entity_name: 'a' has a route already"),
        ([("a", 101), ("b", -1)], r"config\.traffic_config\.routes\[0\]\.traffic_percentage: "),
        ([("a", 110), ("b", -10)], r"config\.traffic_config\.routes\[0\]\.traffic_percentage: "),
    ],
)
def test_routes_that_do_not_split_all_requests_are_refused(routes: list[tuple[str, int]], named: str) -> None:
    with pytest.raises(InvalidParameter, match=f"^{named}"):
        read(a_config_input(an_input(name="a"), an_input(name="b"), routes=routes))


def test_a_route_without_percentage_is_refused() -> None:
    message = a_config_input(an_input(name="a"))
    message.traffic_config.routes.add(served_entity_name="a")
    with pytest.raises(InvalidParameter, match=r"routes\[0\]\.traffic_percentage: "):
        read(message)


def test_the_order_of_entities_and_routes_is_kept_and_a_share_may_be_zero() -> None:
    config = read(a_config_input(an_input(name="b"), an_input(name="a"), routes=[("a", 0), ("b", 100)]))
    assert [entity.name for entity in config.entities] == ["b", "a"]
    assert config.routes == (Route("a", 0), Route("b", 100))


def test_a_configuration_that_is_too_long_is_refused() -> None:
    entities = [an_input(name=name, environment_vars={"V": "x" * 100_000}) for name in ("a", "b", "c")]
    read(a_config_input(*entities[:2], routes=[("a", 50), ("b", 50)]))
    with pytest.raises(InvalidParameter, match=r"^config: .* more than the limit of 262144"):
        read(a_config_input(*entities, routes=[("a", 50), ("b", 50), ("c", 0)]))
