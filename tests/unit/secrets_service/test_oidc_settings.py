"""Which external issuer is trusted: said as a whole or not at all, and never over a way that others can read."""

from __future__ import annotations

import pytest

from secrets_service.settings import SecretsSettings
from servicekit.settings import SettingsError, load

WHOLE = {"TESSERA_OIDC_ISSUER": "https://login.example.com/tenant", "TESSERA_OIDC_AUDIENCE": "tessera"}


def loaded(**environ: str) -> SecretsSettings:
    return load(SecretsSettings, {"TESSERA_DATA_DIR": "/data", **environ})


def problem_of(**environ: str) -> str:
    with pytest.raises(SettingsError) as caught:
        loaded(**environ)
    (problem,) = caught.value.problems
    return problem


def test_issuer_and_audience_are_set_together_or_not_at_all() -> None:
    assert loaded().oidc_issuer == ""
    assert loaded(**WHOLE).oidc_claim == "sub"
    for variable in WHOLE:
        assert "belong together" in problem_of(**{variable: WHOLE[variable]})
    for variable, value in (("TESSERA_OIDC_CLAIM", "email"), ("TESSERA_OIDC_JWKS_URL", "https://login.example.com/k")):
        assert "TESSERA_OIDC_ISSUER" in problem_of(**{variable: value})
        assert loaded(**WHOLE, **{variable: value}).oidc_issuer == WHOLE["TESSERA_OIDC_ISSUER"]


@pytest.mark.parametrize(
    "address",
    [
        "https://login.example.com",
        "https://login.example.com/",
        "https://login.example.com:8443/tenant/v2.0",
        "http://127.0.0.1:8000",
        "http://localhost:8000/realms/one",
        "http://[::1]:8000",
    ],
)
def test_issuer_is_kept_as_it_was_written(address: str) -> None:
    assert loaded(**WHOLE | {"TESSERA_OIDC_ISSUER": address}).oidc_issuer == address


@pytest.mark.parametrize(
    "address",
    [
        "login.example.com",
        "http://login.example.com",
        "http://127.0.0.1.example.com",
        "http://localhost@evil.example.com",
        "https://user@login.example.com",
        "https://",
        "https:///path",
        "https://login.example.com:0",
        "https://login.example.com:port",
        "https://login.example.com/#part",
        "https://login.example.com/a b",
        "https://login.example.com/\u00e9",
        "https://login.example.com/\r\nX: y",
        "ftp://login.example.com",
        "file:///etc/passwd",
        "https://[::1",
    ],
)
def test_other_addresses_are_refused_by_name(address: str) -> None:
    for variable in ("TESSERA_OIDC_ISSUER", "TESSERA_OIDC_JWKS_URL"):
        assert problem_of(**WHOLE | {variable: address}).startswith(f"{variable} is not right: ")


def test_only_keys_may_have_a_query_in_their_address() -> None:
    address = "https://login.example.com/keys?tenant=one"
    assert loaded(**WHOLE, TESSERA_OIDC_JWKS_URL=address).oidc_jwks_url == address
    assert problem_of(**WHOLE | {"TESSERA_OIDC_ISSUER": address}).startswith("TESSERA_OIDC_ISSUER is not right: ")
