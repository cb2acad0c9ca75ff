"""What a model was logged to need, its Python and its packages, and whether an environment has that.

What a model's folder says is somebody else's text, read by a program that may read more than they may. So of a
requirements file only names, versions and markers are taken, and files of the model's own folder; whatever leads
elsewhere (options, addresses, paths) is refused by name. How much there is to read is bounded, whatever refers to what.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from serving_service import plain_yaml
from serving_service.plain_yaml import UnusableYaml

LONGEST_BYTES = 1 << 20
"""Of a file, and of all files of requirements together."""

MOST_LINES = 5_000
"""Of all files of requirements together."""

LONGEST_LINE = 4_000
"""Characters."""

_DEEPEST = 4
"""How many files may include each other."""

_INCLUDED = {"-r": False, "--requirement": False, "-c": True, "--constraint": True}
_COMMENT = re.compile(r"(^|\s)#.*$")
_VERSION = re.compile(r"(?<![0-9])([0-9]{1,3})\.([0-9]{1,3})")

_SKINNY = "mlflow-skinny"
"""The part of MLflow that serves. It counts as MLflow, since MLflow adds itself to whatever is logged."""


class UnusableRequirements(Exception):
    """What the model was logged to need cannot be honoured; the message says which part."""


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What one model was logged to need."""

    python: str | None = None
    """As `major.minor`; None when nothing is said."""
    requirements: tuple[str, ...] = ()
    constraints: tuple[str, ...] = ()
    wheels: tuple[Path, ...] = ()
    """Files that came with the model."""

    @property
    def names(self) -> frozenset[str]:
        """The packages that are asked for by name."""
        return frozenset(canonicalize_name(Requirement(each).name) for each in self.requirements)


def read(model: Path) -> Needs:
    """What the folder of a model says; raises UnusableRequirements, and OSError."""
    python_env, conda = _yaml(model / "python_env.yaml"), _yaml(model / "conda.yaml")
    listed = _Listed(model)
    if (model / "requirements.txt").is_file():
        listed.include("requirements.txt", is_constraint=False)
    elif python_env:
        listed.take(_texts(python_env.get("dependencies"), "python_env.yaml"), is_constraint=False)
    else:
        listed.take(_pip_part(conda), is_constraint=False)
    return Needs(
        python=_python(python_env, conda),
        requirements=tuple(dict.fromkeys(listed.requirements)),
        constraints=tuple(dict.fromkeys(listed.constraints)),
        wheels=tuple(dict.fromkeys(listed.wheels)),
    )


def missing(
    needs: Needs, *, python: str, find: Callable[[str], metadata.Distribution] = metadata.distribution
) -> list[str]:
    """Why an environment with this `python`, a full version, is not what a model needs; empty when it is.

    `find` returns an installed package or raises PackageNotFoundError.
    """
    reasons = []
    if needs.python is not None and _minor(python) != needs.python:
        reasons.append(f"Python {needs.python} is asked for, and this is {python}")
    reasons += [f"{wheel.name} comes with the model" for wheel in needs.wheels]
    installed = _Installed(find)
    for requirement in map(Requirement, needs.requirements):
        reasons += installed.why_not(requirement)
    for constraint in map(Requirement, needs.constraints):
        reasons += installed.why_not(constraint, is_constraint=True)
    return list(dict.fromkeys(reasons))


class _Listed:
    """Collects the lines of files that include each other; each is read once."""

    def __init__(self, model: Path) -> None:
        self._model = model.resolve()
        self._read: set[tuple[Path, bool]] = set()
        self._bytes_left, self._lines_left = LONGEST_BYTES, MOST_LINES
        self.requirements: list[str] = []
        self.constraints: list[str] = []
        self.wheels: list[Path] = []

    def include(self, name: str, *, is_constraint: bool, depth: int = 0) -> None:
        if depth > _DEEPEST:
            raise UnusableRequirements(f"Its files of requirements include each other more than {_DEEPEST} deep.")
        path = self._own(name)
        if (path, is_constraint) in self._read:
            return
        self._read.add((path, is_constraint))
        text = _text(path)
        self._bytes_left -= len(text)
        if self._bytes_left < 0:
            raise UnusableRequirements(f"Its files of requirements are larger than {LONGEST_BYTES >> 20} MiB together.")
        self.take(text.replace("\\\n", " ").splitlines(), is_constraint=is_constraint, depth=depth)

    def take(self, lines: Iterable[str], *, is_constraint: bool, depth: int = 0) -> None:
        for line in lines:
            self._lines_left -= 1
            if self._lines_left < 0:
                raise UnusableRequirements(f"Its requirements have more than {MOST_LINES} lines.")
            if len(line) > LONGEST_LINE:
                raise UnusableRequirements(f"Its requirements hold a line of more than {LONGEST_LINE} characters.")
            if stripped := _COMMENT.sub("", line).strip():
                self._take(stripped, is_constraint=is_constraint, depth=depth)

    def _take(self, line: str, *, is_constraint: bool, depth: int) -> None:
        option, _, rest = line.replace("=", " ", 1).partition(" ") if line.startswith("--") else line.partition(" ")
        if option in _INCLUDED:
            self.include(rest.strip(), is_constraint=is_constraint or _INCLUDED[option], depth=depth + 1)
        elif line.startswith("-"):
            raise UnusableRequirements(
                f"Its requirements hold the option '{option}', which is not supported: where packages come from is set"
                " by whoever runs this platform (TESSERA_REGISTRY_ENV_FILE). Log the model without it."
            )
        elif line.endswith(".whl") and "@" not in line:
            self.wheels.append(self._own(line))
        else:
            (self.constraints if is_constraint else self.requirements).append(str(_requirement(line)))

    def _own(self, name: str) -> Path:
        """A file of the model's folder."""
        path = (self._model / name).resolve()
        if not path.is_relative_to(self._model) or not path.is_file():
            raise UnusableRequirements(f"Its requirements name '{name}', which is no file in the model's folder.")
        return path


class _Installed:
    """What one environment has."""

    def __init__(self, find: Callable[[str], metadata.Distribution]) -> None:
        self._find = find
        self._seen: set[str] = set()

    def why_not(self, requirement: Requirement, *, is_constraint: bool = False, extra: str = "") -> Iterator[str]:
        """What keeps a requirement from being met."""
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            return
        found = self._found(requirement)
        if found is None:
            if not is_constraint:
                yield f"{requirement.name} is not installed"
        elif not requirement.specifier.contains(found.version, prereleases=True):
            yield f"{requirement.name}{requirement.specifier} is asked for, and {found.version} is installed"
        else:
            yield from self._why_not_extras(requirement, found)

    def _why_not_extras(self, requirement: Requirement, found: metadata.Distribution) -> Iterator[str]:
        for extra in sorted(requirement.extras):
            key = f"{canonicalize_name(requirement.name)}[{canonicalize_name(extra)}]"
            if key in self._seen:
                continue
            self._seen.add(key)
            if extra not in (found.metadata.get_all("Provides-Extra") or ()):
                yield f"{key} is not installed"
            for needed in map(Requirement, found.requires or ()):
                if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
                    yield from self.why_not(needed, extra=extra)

    def _found(self, requirement: Requirement) -> metadata.Distribution | None:
        name = canonicalize_name(requirement.name)
        names = [name, _SKINNY] if name == "mlflow" and not requirement.extras else [name]
        for each in names:
            try:
                return self._find(each)
            except metadata.PackageNotFoundError:
                continue
        return None


def _requirement(line: str) -> Requirement:
    try:
        requirement = Requirement(line)
    except (InvalidRequirement, RecursionError):
        raise UnusableRequirements(
            f"Its requirements hold '{line.split()[0][:80]}', which is no package with a version."
        ) from None
    if requirement.url is not None:
        raise UnusableRequirements(
            f"Its requirements name an address for '{requirement.name}', which is not supported: put the package into"
            " an index, or its wheel into the model's folder."
        )
    return requirement


def _pip_part(conda: dict[str, Any]) -> Iterator[str]:
    """The requirements in a conda.yaml; raises UnusableRequirements for packages of conda itself."""
    for entry in _list(conda.get("dependencies"), "conda.yaml"):
        if isinstance(entry, dict):
            yield from _texts(entry.get("pip"), "conda.yaml")
        elif (name := re.split(r"[=<>!~ ]", _a_text(entry, "conda.yaml"), maxsplit=1)[0]) not in ("python", "pip"):
            raise UnusableRequirements(
                f"Its conda.yaml asks for '{name[:80]}' of conda, which is not supported: name it among the packages of"
                " pip."
            )


def _python(python_env: dict[str, Any], conda: dict[str, Any]) -> str | None:
    said = [_a_text(python_env["python"], "python_env.yaml")] if python_env.get("python") else []
    asked = [each for each in _list(conda.get("dependencies"), "conda.yaml") if isinstance(each, str)]
    said += [each for each in asked if re.match(r"python[=<>!~ ]", each)]
    for text in said:
        if found := _VERSION.search(text):
            return f"{found[1]}.{found[2]}"
    return None


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = plain_yaml.content(_text(path))
    except UnusableYaml as error:
        raise UnusableRequirements(f"Its {path.name} {error}.") from None
    if not isinstance(content, dict):
        raise _unexpected(path.name)
    return content


def _texts(value: Any, file: str) -> list[str]:
    return [_a_text(each, file) for each in _list(value, file)]


def _list(value: Any, file: str) -> list[Any]:
    if value is not None and not isinstance(value, list):
        raise _unexpected(file)
    return value or []


def _a_text(value: Any, file: str) -> str:
    if not isinstance(value, str):
        raise _unexpected(file)
    return value


def _unexpected(file: str) -> UnusableRequirements:
    return UnusableRequirements(f"Its {file} is not as MLflow writes it.")


def _text(path: Path) -> str:
    with path.open("rb") as file:
        content = file.read(LONGEST_BYTES + 1)
    if len(content) > LONGEST_BYTES:
        raise UnusableRequirements(f"Its {path.name} is larger than {LONGEST_BYTES >> 20} MiB.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UnusableRequirements(f"Its {path.name} is not text in UTF-8.") from None
