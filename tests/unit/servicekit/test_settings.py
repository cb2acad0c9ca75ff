"""Settings: read from the environment at start, every mistake named by its variable, all at once."""

from __future__ import annotations

import dataclasses
import importlib
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from servicekit import settings
from servicekit.settings import AuditedSettings, ServiceSettings, SettingsError, load, setting

ROOT = Path(__file__).parents[3]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShopSettings(ServiceSettings):
    listen: str = setting("SHOP_LISTEN", settings.address, help="Where to listen.")
    patience: float = setting("SHOP_PATIENCE", settings.seconds, default=2.5, help="Seconds.")
    places: int = setting("SHOP_PLACES", settings.count, default=3, help="How many.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse_plaintext("SHOP_LISTEN", self.listen)


def problems_of(cls: type[ServiceSettings] = ShopSettings, **environ: str) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        load(cls, environ)
    return caught.value.problems


def loaded(**environ: str) -> ShopSettings:
    return load(ShopSettings, {"SHOP_LISTEN": "127.0.0.1:0", **environ})


def settings_classes() -> list[type[ServiceSettings]]:
    """The settings of every service that there is."""
    modules = [importlib.import_module(f"{path.parent.name}.settings") for path in ROOT.glob("*/settings.py")]
    found = {
        value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, ServiceSettings)
    }
    return sorted(found, key=lambda cls: cls.__name__)


def test_all_mistakes_are_reported_at_once_by_variable() -> None:
    problems = problems_of(SHOP_PATIENCE="soon", SHOP_PLACES="-1", TESSERA_LOG_LEVEL="loud", TESSERA_SUPERVISED="?")
    assert sorted(problem.split()[0] for problem in problems) == [
        "SHOP_LISTEN",
        "SHOP_PATIENCE",
        "SHOP_PLACES",
        "TESSERA_LOG_LEVEL",
        "TESSERA_SUPERVISED",
    ]
    assert all("\n" not in problem for problem in problems)


def test_problem_says_what_was_expected_and_not_what_was_given() -> None:
    (problem,) = problems_of(SHOP_LISTEN="127.0.0.1:0", SHOP_PATIENCE="s3cret")
    assert problem == "SHOP_PATIENCE is not right: expected a number of seconds"


def test_setting_that_is_unset_or_empty_has_its_default() -> None:
    configured = loaded(SHOP_PATIENCE="")
    assert (configured.patience, configured.places, configured.log_level) == (2.5, 3, "info")
    assert configured.socket_dir is None
    assert configured.supervised is False


def test_required_setting_that_is_empty_is_missing() -> None:
    (problem,) = problems_of(SHOP_LISTEN="")
    assert problem == "SHOP_LISTEN is not set. It says: Where to listen."


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (settings.boolean, "TRUE", True),
        (settings.boolean, "0", False),
        (settings.seconds, "0", 0.0),
        (settings.seconds, "1.5", 1.5),
        (settings.count, "007", 7),
        (settings.numbers, "7-9", range(7, 10)),
        (settings.directory, "relative", Path.cwd() / "relative"),
        (settings.one_of("debug", "info"), "INFO", "info"),
        (settings.address, "127.0.0.1:65535", "127.0.0.1:65535"),
        (settings.address, "[::1]:0", "[::1]:0"),
    ],
)
def test_value_of_the_expected_form_is_taken(parse: object, text: str, value: object) -> None:
    assert callable(parse)
    assert parse(text) == value


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        (settings.boolean, "maybe"),
        *((settings.seconds, text) for text in ("nan", "inf", "-1", "1e9", "1s")),
        *((settings.count, text) for text in ("-1", "1.0", "٣", "")),
        *((settings.numbers, text) for text in ("7", "9-7", "-7", "7-", "a-b")),
        *((settings.address, text) for text in ("8080", ":8080", "host:", "host:65536", "host:٣", "::1:8080", "")),
        (settings.one_of("debug", "info"), "trace"),
        (settings.directory, "~nobody-of-this-name/data"),
    ],
)
def test_value_of_another_form_is_refused(parse: object, text: str) -> None:
    assert callable(parse)
    with pytest.raises(ValueError, match="expected"):
        parse(text)


@pytest.mark.parametrize("listen", ["0.0.0.0:1", "[::]:1", "192.0.2.1:1", "example.com:1", "127.0.0.1.example.com:1"])
def test_plaintext_beyond_loopback_is_refused_unless_allowed(listen: str) -> None:
    (problem,) = problems_of(SHOP_LISTEN=listen)
    assert problem.startswith(f"SHOP_LISTEN is {listen}, which other machines can reach")
    assert "TESSERA_ALLOW_PLAINTEXT_BEYOND_LOOPBACK=true" in problem
    assert loaded(SHOP_LISTEN=listen, TESSERA_ALLOW_PLAINTEXT_BEYOND_LOOPBACK="true").listen == listen


@pytest.mark.parametrize("listen", ["127.0.0.1:1", "127.8.8.8:1", "[::1]:1", "localhost:1"])
def test_loopback_needs_no_permission(listen: str) -> None:
    assert loaded(SHOP_LISTEN=listen).listen == listen


def test_data_directory_is_the_users_own_when_settings_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", "/somewhere/data")
    assert loaded().data_dir == Path("/somewhere/data/tessera")
    monkeypatch.setenv("XDG_DATA_HOME", "not/absolute")
    monkeypatch.setenv("HOME", "/home/me")
    assert loaded().data_dir == Path("/home/me/.local/share/tessera")


def test_user_without_a_home_is_told_to_name_a_data_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    (problem,) = problems_of(SHOP_LISTEN="127.0.0.1:0")
    assert problem == "TESSERA_DATA_DIR is not set, and this user has no home directory."
    assert loaded(TESSERA_DATA_DIR="/data").data_dir == Path("/data")


def test_help_names_each_variable_with_default_and_meaning() -> None:
    text = settings.described(ShopSettings)
    assert "  SHOP_LISTEN  (required)\n      Where to listen." in text
    assert "  SHOP_PATIENCE  (default: 2.5)\n      Seconds." in text
    assert "  TESSERA_SOCKET_DIR  (optional)\n" in text


@pytest.mark.parametrize("cls", settings_classes())
def test_every_setting_of_every_service_is_described(cls: type[ServiceSettings]) -> None:
    variables = [field.metadata["variable"] for field in dataclasses.fields(cls)]
    assert len(set(variables)) == len(variables)
    for field in dataclasses.fields(cls):
        # That one is systemd's.
        assert (
            field.metadata["variable"].startswith("TESSERA_") or field.metadata["variable"] == "CREDENTIALS_DIRECTORY"
        )
        text = field.metadata["help"]
        assert text[:1].isupper() or field.name in text or text.startswith("host:port"), field.name
        assert text.endswith("."), f"{field.name}: {text}"
        assert "\n" not in text


def test_certificate_and_key_are_set_together_or_not_at_all(tmp_path: Path) -> None:
    for variable in ("TESSERA_TLS_CERT", "TESSERA_TLS_KEY"):
        with pytest.raises(SettingsError, match="belong together"):
            loaded(**{variable: str(tmp_path / "file")})
    both = loaded(TESSERA_TLS_CERT=str(tmp_path / "a"), TESSERA_TLS_KEY=str(tmp_path / "b"))
    assert both.has_tls
    assert not loaded().has_tls


def test_listener_with_a_certificate_may_be_reached_by_other_machines(tmp_path: Path) -> None:
    files = {"TESSERA_TLS_CERT": str(tmp_path / "a"), "TESSERA_TLS_KEY": str(tmp_path / "b")}
    assert loaded(SHOP_LISTEN="0.0.0.0:0", **files).listen == "0.0.0.0:0"


def test_every_service_may_listen_beyond_loopback_with_tls_and_not_without(tmp_path: Path) -> None:
    files = {"tls_cert": tmp_path / "a", "tls_key": tmp_path / "b"}
    classes: list[Any] = [cls for cls in settings_classes() if cls not in (ServiceSettings, AuditedSettings)]
    for cls in classes:
        listening = partial(cls, data_dir=tmp_path, listen="0.0.0.0:0")
        assert listening(**files).has_tls
        with pytest.raises(ValueError, match="TESSERA_TLS_CERT and TESSERA_TLS_KEY"):
            listening()
        with pytest.raises(ValueError, match="belong together"):
            listening(tls_cert=tmp_path / "a")


def test_traces_are_off_until_a_collector_is_named() -> None:
    assert loaded().otlp_endpoint is None
    assert loaded(TESSERA_OTLP_ENDPOINT="http://127.0.0.1:4317/").otlp_endpoint == "http://127.0.0.1:4317"
    assert "TESSERA_OTLP_ENDPOINT" in problems_of(SHOP_LISTEN="127.0.0.1:0", TESSERA_OTLP_ENDPOINT="127.0.0.1:4317")[0]


@pytest.mark.parametrize("text", ["-0.1", "1.1", "nan", "half", "inf"])
def test_a_ratio_is_a_number_from_0_to_1(text: str) -> None:
    assert [loaded(TESSERA_TRACE_RATIO=good).trace_ratio for good in ("0", "0.25", "1")] == [0.0, 0.25, 1.0]
    assert "TESSERA_TRACE_RATIO" in problems_of(SHOP_LISTEN="127.0.0.1:0", TESSERA_TRACE_RATIO=text)[0]


def test_trusted_proxies_are_addresses_and_networks() -> None:
    assert [str(one) for one in loaded(TESSERA_TRUSTED_PROXIES="10.0.0.7, fd00::/8").trusted_proxies] == [
        "10.0.0.7/32",
        "fd00::/8",
    ]
    assert "TESSERA_TRUSTED_PROXIES" in problems_of(SHOP_LISTEN="127.0.0.1:0", TESSERA_TRUSTED_PROXIES="everybody")[0]


@pytest.mark.parametrize(
    ("module", "cls", "variable"),
    [
        ("secrets_service", "SecretsSettings", "TESSERA_SECRETS_PEER_LISTEN"),
        ("serving_service", "ServingSettings", "TESSERA_SERVING_PEER_LISTEN"),
        ("serving_service", "ServingSettings", "TESSERA_SECRETS_ADDRESS"),
        ("gateway", "GatewaySettings", "TESSERA_SECRETS_ADDRESS"),
        ("gateway", "GatewaySettings", "TESSERA_SERVING_ADDRESS"),
    ],
)
def test_services_on_other_machines_need_certificates_to_be_known_by(module: str, cls: str, variable: str) -> None:
    kind = getattr(importlib.import_module(f"{module}.settings"), cls)
    files = {"TESSERA_PEER_CERT": "/c", "TESSERA_PEER_KEY": "/k", "TESSERA_PEER_CA": "/a"}
    (problem,) = problems_of(kind, **{variable: "127.0.0.1:8091"})
    assert variable in problem
    assert "TESSERA_PEER_CERT" in problem
    (problem,) = problems_of(kind, **{variable: "127.0.0.1:8091", "TESSERA_PEER_CERT": "/c", "TESSERA_PEER_CA": "/a"})
    assert "belong together" in problem
    load(kind, {variable: "127.0.0.1:8091", **files})


def test_trust_domain_is_written_as_spiffe_has_it() -> None:
    for wrong in ("Example.org", "spiffe://example.org", "example.org/svc", "a b"):
        (problem,) = problems_of(SHOP_LISTEN="127.0.0.1:0", TESSERA_PEER_TRUST_DOMAIN=wrong)
        assert "TESSERA_PEER_TRUST_DOMAIN" in problem
    assert loaded(TESSERA_PEER_TRUST_DOMAIN="example.org").peer_trust_domain == "example.org"


def test_audit_records_leave_the_machine_in_clear_only_where_somebody_allowed_that(tmp_path: Path) -> None:
    def forwarding(to: str, **more: str) -> AuditedSettings:
        return load(AuditedSettings, {"TESSERA_DATA_DIR": str(tmp_path), "TESSERA_AUDIT_FORWARD": to, **more})

    for to in ("unix:/dev/log", "tcp:127.0.0.1:601", "tcp:[::1]:601", "dir:/mnt"):
        assert forwarding(to).audit_forwarder("secrets") is not None
    assert load(AuditedSettings, {"TESSERA_DATA_DIR": str(tmp_path)}).audit_forwarder("secrets") is None
    for wrong in ("/dev/log", "unix:dev/log", "dir:", "tcp:601", "tcp:127.0.0.1:0", "udp:127.0.0.1:514"):
        with pytest.raises(SettingsError, match="TESSERA_AUDIT_FORWARD"):
            forwarding(wrong)
    with pytest.raises(SettingsError, match="travels in clear"):
        forwarding("tcp:192.0.2.7:601")
    assert forwarding("tcp:192.0.2.7:601", TESSERA_ALLOW_PLAINTEXT_BEYOND_LOOPBACK="true")
