"""What the program says of what it was sent: next to nothing (section "What is said", docs/security.md)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.hygiene_lint import Module

ROOT = Path(__file__).parents[2]
PACKAGES = ("secrets_service", "serving_service", "gateway", "servicekit", "tessera")

MODULES = {
    path.relative_to(ROOT).as_posix(): Module(path.read_text())
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
    if "_pb2" not in path.name
}

REVEALING = {
    "secrets_service/answers.py: AnswerSeal.open",
    "secrets_service/audit_servicer.py: audit_keys",
    "secrets_service/cipher.py: Cipher._derived",
    "secrets_service/cipher.py: Cipher.seal",
    "secrets_service/first_format.py: FirstFormat._derived",
    "secrets_service/first_format.py: is_key_of",
    "secrets_service/foundation.py: _opened",
    "secrets_service/grants.py: LaunchGrants.resolve.resolve",
    "secrets_service/integrity.py: Integrity._under",
    "secrets_service/keyring.py: Keyring.opened",
    "secrets_service/keyring.py: Keyring.sealed",
    "secrets_service/kms.py: KmsPlugin.stage",
    "secrets_service/resolver.py: _fits_environment",
    "secrets_service/scopes.py: SecretScopes.get_secret",
    "secrets_service/scopes.py: SecretScopes.put_secret.put",
    "secrets_service/servicer.py: SecretResolverServicer.Resolve",
    "secrets_service/servicer.py: SecretsServicer.GetSecret",
    "secrets_service/tokens.py: Presented.text",
    "secrets_service/tokens.py: TokenMacs._under",
    "secrets_service/tokens.py: _begun",
    "secrets_service/versions.py: SecretVersions.restore.restore",
    "tessera/cli/restore.py: run",
    "tessera/cli/verify.py: root_key",
}
"""Who looks at secret values: to seal, to open, to derive and compare, to say how they end, and for the answers that
are meant to hold them. Whoever adds one says in a review why."""

KNOWN_EVENTS = {
    "servicekit/warnings.py: warn: the text is not fixed",
    "serving_service/controller.py: EndpointController._not_started: message",
    "serving_service/notices.py: Outbox._attempt: error",
    "serving_service/registry.py: MlflowRegistry._whole: key",
}
"""Fields and texts that the rule takes for more than they are."""

DRIVERS = {"StorageError", "ConstraintBroken"}
"""Exceptions of ours that say what the driver of a database said."""

KNOWN_TEXTS = {
    ("secrets_service/issuer_keys.py: IssuerKeys._refresh", "TimeoutError"),
    ("secrets_service/rootsource.py: _from_descriptor", "OSError"),
    ("secrets_service/rootsource.py: _from_descriptor", "ValueError"),
    ("servicekit/database.py: _begin", "sqlite3.DatabaseError"),
    ("servicekit/database.py: _of_a_copy", "sqlite3.Error"),
    ("servicekit/database.py: faults", "StorageError"),
    ("servicekit/policy.py: _problems", "ValueError"),
    ("servicekit/settings.py: load", "ValueError"),
    ("serving_service/caches.py: FolderCache.tidy", "OSError"),
    ("serving_service/caches.py: FolderCache.tidy", "StorageError"),
    ("serving_service/isolation.py: _why_not", "OSError"),
    ("serving_service/isolation.py: _why_not", "TimeoutError"),
    ("serving_service/launcher.py: LocalLauncher._forked", "TimeoutError"),
    ("serving_service/meters.py: Meters.receive", "ValueError"),
    ("serving_service/model_server/mlflow_rules.py: _check_description", "Exception"),
    ("serving_service/registry_helper.py: Registry._check_sqlite", "sqlite3.DatabaseError"),
    ("serving_service/shim/__main__.py: main", "OSError"),
    ("serving_service/shim/replica.py: Replica.start", "OSError"),
    ("serving_service/shim/replica.py: _forked", "BaseException"),
    ("serving_service/warm/__main__.py: _live", "OSError"),
    ("serving_service/warm/__main__.py: main", "Exception"),
    ("tessera/cli/certs.py: _trust_domain", "ValueError"),
    ("tessera/cli/verify.py: faults_with_key", "StorageError"),
}
"""Foreign exceptions whose text is repeated, each looked at: what it can say is the system's, or it stays where whoever
sees it has sent what it says."""


def test_secret_values_are_looked_at_in_known_places_alone() -> None:
    found = {f"{name}: {place}" for name, module in MODULES.items() for place in module.revealing()}
    assert found == REVEALING


def test_log_events_are_fixed_texts_with_chosen_fields() -> None:
    found = {f"{name}: {event}" for name, module in MODULES.items() for event in module.careless_events()}
    assert found == KNOWN_EVENTS


def test_exceptions_become_text_only_when_we_wrote_it() -> None:
    ours = {each for module in MODULES.values() for each in module.classes()}
    found = {
        (f"{name}: {place}", kind)
        for name, module in MODULES.items()
        for place, kind in module.exceptions_as_text()
        if kind in DRIVERS or kind.startswith("sqlite3.") or kind.rpartition(".")[2] not in ours
    }
    assert found == KNOWN_TEXTS


CARELESS = {
    "a formatted text": 'def f(request): log.info(f"asked {request}")',
    "an argument": 'def f(request): log.info("asked %s", request)',
    "a request": 'def f(request): log.info("asked", extra={"request": request})',
    "a message as JSON": 'def f(message): log.info("asked", extra={"asked": json_format.MessageToJson(message)})',
    "a message's own text": 'def f(request): log.info("asked", extra={"asked": request.SerializeToString()})',
    "a shape that is none": 'def f(request): log.info("asked", extra={"asked": shape_of(request)})',
    "its text": 'def f(request): log.info("asked", extra={"request": str(request)})',
    "one among others": 'def f(metadata): log.info("asked", extra={"a": [1, metadata]})',
    "all of them": 'def f(metadata): log.info("asked", extra=metadata)',
    "merged ones": 'def f(metadata): log.info("asked", extra={"a": 1} | metadata)',
    "unpacked ones": 'def f(environ): log.info("asked", extra={**environ})',
    "an exception": 'def f():\n try: g()\n except OSError as error: log.info("failed", extra={"cause": error})',
}


@pytest.mark.parametrize("name", CARELESS)
def test_careless_event_is_found(name: str) -> None:
    assert list(Module(CARELESS[name]).careless_events())


@pytest.mark.parametrize(
    "source",
    [
        'def f(request): log.info("asked", extra={"scope": request.scope})',
        'def f(request): log.info("asked", extra={"request": safe_repr(request)})',
        'def f(well): log.info("ready" if well else "not ready")',
        'def f(error): log.error("failed", exc_info=(type(error), error, None))',
    ],
)
def test_careful_event_passes(source: str) -> None:
    assert list(Module(source).careless_events()) == []


@pytest.mark.parametrize("text", ['f"no: {error}"', "str(error)", "repr(error)"])
def test_exception_that_becomes_text_is_found(text: str) -> None:
    source = f"def f():\n try: g()\n except (OSError, a.Refused) as error: raise Other({text})"
    assert list(Module(source).exceptions_as_text()) == [("f", "OSError"), ("f", "a.Refused")]
