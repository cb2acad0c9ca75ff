"""What is said beside the configuration: what is switched on is refused by its name, the rest comes back as said."""

from __future__ import annotations

import pytest
from google.protobuf.json_format import ParseDict

from servicekit.errors import FeatureDisabled, InvalidParameter
from serving_service import details
from tessera.serving.v1 import serving_pb2 as pb

GATEWAY_OFF = {
    "fallback_config": {"enabled": False},
    "guardrails": {"input": {"safety": False, "pii": {"behavior": "NONE"}}, "output": {}},
    "inference_table_config": {"catalog_name": "", "schema_name": "s", "enabled": False},
    "usage_tracking_config": {},
}


def a_gateway(**fields: object) -> pb.AiGatewayConfig:
    return ParseDict(fields, pb.AiGatewayConfig())


def a_telemetry(**fields: object) -> pb.TelemetryConfig:
    return ParseDict(fields, pb.TelemetryConfig())


@pytest.mark.parametrize(
    ("field", "given"),
    [
        ("fallback_config.enabled", {"fallback_config": {"enabled": True}}),
        ("inference_table_config.enabled", {"inference_table_config": {"enabled": True}}),
        ("usage_tracking_config.enabled", {"usage_tracking_config": {"enabled": True}}),
        ("rate_limits", {"rate_limits": [{"renewal_period": "minute", "calls": 1}]}),
        ("guardrails.input.safety", {"guardrails": {"input": {"safety": True}}}),
        ("guardrails.output.pii", {"guardrails": {"output": {"pii": {"behavior": "BLOCK"}}}}),
        ("guardrails.input.invalid_keywords", {"guardrails": {"input": {"invalid_keywords": ["x"]}}}),
        ("guardrails.output.valid_topics", {"guardrails": {"output": {"valid_topics": ["x"]}}}),
    ],
)
def test_a_gateway_feature_that_is_switched_on_is_refused_by_its_name(field: str, given: dict[str, object]) -> None:
    with pytest.raises(FeatureDisabled, match=rf"^ai_gateway\.{field}: "):
        details.read_ai_gateway(a_gateway(**given), at="ai_gateway")


def test_what_is_switched_off_comes_back_as_it_was_said() -> None:
    given = a_gateway(**GATEWAY_OFF)
    said = details.read_ai_gateway(given, at="ai_gateway")
    assert said == GATEWAY_OFF
    assert details.message(pb.AiGatewayConfig, said) == given


def test_an_empty_gateway_is_none() -> None:
    assert details.read_ai_gateway(pb.AiGatewayConfig(), at="") is None
    assert details.message(pb.AiGatewayConfig, None) is None


@pytest.mark.parametrize(
    ("field", "given"),
    [
        ("telemetry_profile_id", {"telemetry_profile_id": "p"}),
        ("enabled_telemetry_features", {"enabled_telemetry_features": ["TELEMETRY_FEATURE_TRACES"]}),
        ("table_names.logs_table", {"table_names": {"logs_table": "t"}}),
        ("inference_table_config.sampling_fraction", {"inference_table_config": {"sampling_fraction": 0.5}}),
    ],
)
def test_telemetry_that_is_switched_on_is_refused_by_its_name(field: str, given: dict[str, object]) -> None:
    with pytest.raises(FeatureDisabled, match=rf"^telemetry_config\.{field}: "):
        details.read_telemetry(a_telemetry(**given), at="telemetry_config")


def test_telemetry_that_is_switched_off_is_kept() -> None:
    off = {"table_names": {}, "inference_table_config": {"sampling_fraction": 0.0}}
    assert details.read_telemetry(a_telemetry(**off), at="") == off


@pytest.mark.parametrize("address", ["", "ada", "a@", "@b", "a b@c", "a@b@c", f"{'a' * 65}@b", "a@b\n"])
def test_what_is_no_address_is_refused_by_its_place(address: str) -> None:
    given = pb.EmailNotifications(on_update_success=["ada@example.com", address])
    with pytest.raises(InvalidParameter, match=r"^email_notifications\.on_update_success\[1\]: "):
        details.read_notifications(given, at="email_notifications")


@pytest.mark.parametrize("keys", [["a", "a"], [""]])
def test_a_tag_needs_a_key_of_its_own(keys: list[str]) -> None:
    with pytest.raises(InvalidParameter, match=r"^tags: "):
        details.read_tags([pb.EndpointTag(key=key) for key in keys], at="tags")


def test_a_tag_without_a_value_is_another_one_than_a_tag_with_an_empty_one() -> None:
    tags = details.read_tags([pb.EndpointTag(key="a"), pb.EndpointTag(key="b", value="")], at="tags")
    assert tags == (("a", None), ("b", ""))


def test_tags_keep_their_places_and_deleting_wins() -> None:
    changed = details.changed_tags(
        (("a", "1"), ("b", None)), added=(("c", "2"), ("a", "3"), ("d", "4")), deleted=["b", "d", "nowhere"]
    )
    assert changed == (("a", "3"), ("c", "2"))


def test_tags_are_bounded_together() -> None:
    given = [pb.EndpointTag(key=f"k{number:03}", value="x" * 92) for number in range(64)]
    full = details.read_tags(given, at="tags")
    with pytest.raises(InvalidParameter, match=r"^tags: .* more than the limit of 6144"):
        details.read_tags([*given, pb.EndpointTag(key="k")], at="tags")
    assert details.changed_tags(full, added=(), deleted=["k000"]) == full[1:]
    with pytest.raises(InvalidParameter, match=r"^add_tags: .* more than the limit of 6144"):
        details.changed_tags(full, added=(("k", None),), deleted=())
