"""The variables that only helper processes see: credentials of registries, of the stores behind them and of package
indexes, from a file that nobody else can read.

They are in no setting and in no other process's environment. The file is read again when it has changed; one that is
not as it should be is refused, and what was read before stays in force.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote, urlsplit

from servicekit import private_file
from servicekit.errors import StartError
from serving_service.shim.masking import Masker

log = logging.getLogger(__name__)

LONGEST_BYTES = 1 << 18

PACKAGES_PREFIX = "UV_"
"""Variables of this prefix are for the builder of environments alone."""

_BOTH = re.compile(r"(HTTPS?|ALL|NO)_PROXY|SSL_CERT_(FILE|DIR)", re.IGNORECASE)
_INHERITED = ("HOME", "PATH", "LANG", "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "AWS_CA_BUNDLE")
_CREDENTIALS = ("MLFLOW_", "AWS_", "AZURE_", "GOOGLE_", "DATABRICKS_", "UV_")
_LINE = re.compile(r"(?:export\s+)?([A-Za-z_][A-Za-z0-9_]*)=(.*)")
_WHAT = "The file of TESSERA_REGISTRY_ENV_FILE,"


class HelperVariables:
    """The variables of a file, or none; raises StartError when the file is not as it should be."""

    def __init__(self, path: Path | None, *, service_environment: Mapping[str, str]) -> None:
        self._path = path
        self._inherited = {name: service_environment[name] for name in _INHERITED if name in service_environment}
        self._seen = _identity(path)
        self._use({} if path is None else _read(path))
        ignored = {name for name in service_environment if name.startswith(_CREDENTIALS)}
        ignored -= self._variables.keys() | self._inherited.keys()
        if ignored:
            hint = "TESSERA_REGISTRY_ENV_FILE names the file that helpers take them from"
            log.warning("variables are not handed to helpers", extra={"variables": sorted(ignored), "hint": hint})

    def refresh(self) -> bool:
        """Looks whether the file has changed; whether other variables are in force than before."""
        if self._path is None or (seen := _identity(self._path)) == self._seen:
            return False
        self._seen, before = seen, self._variables
        try:
            self._use(_read(self._path))
        except StartError as error:
            log.error("variables of helpers stay as they were", extra={"cause": str(error)})
        return self._variables != before

    def for_registry(self) -> dict[str, str]:
        """The whole environment of the registry helper."""
        given = {name: value for name, value in self._variables.items() if not name.startswith(PACKAGES_PREFIX)}
        # MLflow's own default keeps trying for minutes, long after whoever asked has gone.
        return {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", **self._inherited, **given}

    def for_packages(self) -> dict[str, str]:
        """The environment of what builds environments."""
        given = {
            name: value
            for name, value in self._variables.items()
            if name.startswith(PACKAGES_PREFIX) or _BOTH.fullmatch(name)
        }
        return {**self._inherited, **given}

    @property
    def masker(self) -> Masker:
        """Hides what the file holds."""
        return self._masker

    def redacted(self, text: str) -> str:
        """A text without what the file holds."""
        return self._masker.mask(text.encode()).decode(errors="replace")

    def _use(self, variables: dict[str, str]) -> None:
        self._variables = variables
        self._masker = Masker(secret for value in variables.values() for secret in (value, *_credentials(value)))


def _credentials(value: str) -> list[str]:
    """User and password of an address, as they stand there and as they are meant."""
    try:
        login = urlsplit(value).netloc.rpartition("@")[0]
    except ValueError:
        return []
    password = login.partition(":")[2]
    return [each for text in (login, password) for each in (text, unquote(text)) if text]


def _identity(path: Path | None) -> tuple[int, ...] | None:
    if path is None:
        return None
    try:
        found = os.stat(path)  # noqa: PTH116
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size, found.st_mode, found.st_uid


def _read(path: Path) -> dict[str, str]:
    try:
        content = private_file.read(path, what=_WHAT, longest=LONGEST_BYTES + 1, may_be_link=True)
        text = content.decode()
    except FileNotFoundError:
        raise StartError(f"{_WHAT} {path} does not exist.") from None
    except UnicodeDecodeError:
        raise StartError(f"{_WHAT} {path} is not text in UTF-8.") from None
    if len(content) > LONGEST_BYTES:
        raise StartError(f"{_WHAT} {path} is larger than {LONGEST_BYTES >> 10} KiB.")
    variables = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        found = _LINE.fullmatch(line.strip())
        if found is None or "\0" in line:
            # Not what stands there: it may be a value that went astray.
            raise StartError(f"{_WHAT} {path} has no NAME=value in line {number}.")
        variables[found[1]] = _unquoted(found[2].strip())
    return variables


def _unquoted(value: str) -> str:
    if len(value) >= 2 and value[0] == value[-1] and value[0] in "'\"":
        return value[1:-1]
    return value
