"""What a model's folder says that it needs, what of that is taken, and whether an environment has it."""

from __future__ import annotations

from email.message import Message
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from serving_service import requirements
from serving_service.requirements import Needs, UnusableRequirements


def a_model(folder: Path, **files: str) -> Path:
    for name, content in files.items():
        (folder / name.replace("_txt", ".txt").replace("_yaml", ".yaml")).write_text(content)
    return folder


def as_logged(python: str = "3.11.7") -> dict[str, str]:
    """The two files that MLflow writes beside requirements.txt."""
    return {
        "python_env_yaml": f"python: {python}\nbuild_dependencies: [pip]\ndependencies: [-r requirements.txt]\n",
        "conda_yaml": f"dependencies:\n- python={python}\n- pip<=23\n- pip:\n  - mlflow==3.1\nname: mlflow-env\n",
    }


class Distributions:
    """Installed packages: version, and what each needs."""

    def __init__(self, **versions: str) -> None:
        self.versions = versions
        self.needs: dict[str, list[str]] = {}
        self.extras: dict[str, list[str]] = {}

    def __call__(self, name: str) -> Any:
        key = name.replace("-", "_")
        if key not in self.versions:
            raise metadata.PackageNotFoundError(name)
        about = Message()
        for extra in self.extras.get(key, []):
            about["Provides-Extra"] = extra
        needed = self.needs.get(key)
        return type("Found", (), {"version": self.versions[key], "requires": needed, "metadata": about})()


# --- what is read ---------------------------------------------------------------------------------------------------


def test_what_mlflow_logs_is_read(tmp_path: Path) -> None:
    text = "mlflow==3.1  # added\n\n# pandas==1\nPandas>=2,<3 ; python_version > '3.0'\nscikit-learn[alldeps]==1.5.0\n"
    needs = requirements.read(a_model(tmp_path, requirements_txt=text, **as_logged("3.12.4")))
    assert needs == Needs(
        python="3.12",
        requirements=("mlflow==3.1", 'Pandas<3,>=2; python_version > "3.0"', "scikit-learn[alldeps]==1.5.0"),
    )
    assert needs.names == {"mlflow", "pandas", "scikit-learn"}


def test_without_requirements_the_other_files_say_what_is_needed(tmp_path: Path) -> None:
    conda = as_logged("3.11.7")["conda_yaml"]
    assert requirements.read(a_model(tmp_path, conda_yaml=conda)) == Needs(python="3.11", requirements=("mlflow==3.1",))
    env = "python: 3.13.0\ndependencies: [numpy==2.0]\n"
    assert requirements.read(a_model(tmp_path, python_env_yaml=env)) == Needs(
        python="3.13", requirements=("numpy==2.0",)
    )


def test_a_folder_that_says_nothing_needs_nothing(tmp_path: Path) -> None:
    assert requirements.read(tmp_path) == Needs()


def test_constraints_and_included_files_and_wheels_of_the_model_are_read(tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "own-1.0-py3-none-any.whl").touch()
    a_model(tmp_path, more_txt="six\n-c constraints.txt", constraints_txt="numpy<2\n")
    a_model(tmp_path, requirements_txt="--requirement=more.txt\ncode/own-1.0-py3-none-any.whl\npandas \\\n >=2\n")
    wheel = tmp_path.resolve() / "code" / "own-1.0-py3-none-any.whl"
    assert requirements.read(tmp_path) == Needs(
        requirements=("six", "pandas>=2"), constraints=("numpy<2",), wheels=(wheel,)
    )


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("--index-url https://user:canary@example.com/simple", "'--index-url'"),
        ("--extra-index-url=https://user:canary@example.com", "'--extra-index-url'"),
        ("-e canary", "'-e'"),
        ("-r ../canary.txt", "canary.txt"),
        ("-r /etc/passwd", "no file in the model's folder"),
        ("-c link.txt", "no file in the model's folder"),
        ("../outside.whl", "no file in the model's folder"),
        ("tiny @ https://user:canary@example.com/tiny.whl", "'tiny'"),
        ("git+https://canary@example.com/x.git", "no package with a version"),
        ("./package", "no package with a version"),
    ],
)
def test_whatever_leads_elsewhere_is_refused_by_name(tmp_path: Path, line: str, named: str) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (tmp_path / "outside.whl").touch()
    (tmp_path / "root.key").write_text("canary")
    (model / "link.txt").symlink_to(tmp_path / "root.key")
    a_model(model, requirements_txt=f"numpy\n{line}\n")
    with pytest.raises(UnusableRequirements) as caught:
        requirements.read(model)
    assert named in str(caught.value)
    assert "user" not in str(caught.value)


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({"conda_yaml": "dependencies: [python=3.11, scipy=1.0]"}, "'scipy'"),
        ({"python_env_yaml": "[1, 2"}, "python_env.yaml is not YAML"),
        ({"python_env_yaml": "[1, 2]"}, "not as MLflow writes it"),
        ({"conda_yaml": "&a [*a]"}, "conda.yaml"),
        ({"conda_yaml": "dependencies: [python=3.11, {pip: numpy}]"}, "not as MLflow writes it"),
        ({"conda_yaml": "dependencies: [python=3.11, {pip: [[numpy]]}]"}, "not as MLflow writes it"),
        ({"python_env_yaml": "dependencies: numpy"}, "not as MLflow writes it"),
        ({"python_env_yaml": "dependencies: [{numpy: 1}]"}, "not as MLflow writes it"),
        ({"python_env_yaml": "python: [3, 11]"}, "not as MLflow writes it"),
        ({"python_env_yaml": "{[python]: 3.11}"}, "a key that is no text"),
        ({"python_env_yaml": "a: " + "[" * 40 + "]" * 40}, "deeper than 32 levels"),
        ({"python_env_yaml": f"a: [{'b, ' * 30_000}]"}, "more than 20000 parts"),
        ({"requirements_txt": "x" * (1 << 20) + "\n\n"}, "larger than 1 MiB"),
        ({"requirements_txt": f"a; {'(' * 1_500}os_name=='x'{')' * 1_500}"}, "no package with a version"),
        ({"requirements_txt": f"a=={'1' * 5_000}"}, "more than 4000 characters"),
        ({"requirements_txt": "a\n" * 5_001}, "more than 5000 lines"),
    ],
)
def test_files_that_make_no_sense_are_refused_by_name(tmp_path: Path, files: dict[str, str], named: str) -> None:
    with pytest.raises(UnusableRequirements, match=named):
        requirements.read(a_model(tmp_path, **files))


@pytest.mark.parametrize("file", ["python_env_yaml", "conda_yaml"])
def test_parts_that_stand_for_others_are_refused_not_written_out(tmp_path: Path, file: str) -> None:
    """Seven levels of ten are ten million texts; nothing of that is made."""
    levels = ["a: &a0 [x]", *(f"b{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 8))]
    text = "\n".join([*levels, "dependencies: *a7\n"])
    with pytest.raises(UnusableRequirements, match="refers to another part of itself"):
        requirements.read(a_model(tmp_path, **{file: text}))
    with pytest.raises(UnusableRequirements, match="refers to another part of itself"):
        requirements.read(a_model(tmp_path, **{file: "a: &a {python: 3.11}\n<<: *a\n"}))


def test_versions_are_texts_however_they_are_written(tmp_path: Path) -> None:
    """As numbers, 3.10 were 3.1."""
    assert requirements.read(a_model(tmp_path, python_env_yaml="python: 3.10\ndependencies:\n")) == Needs(python="3.10")


def test_each_file_is_read_once_however_often_it_is_included(tmp_path: Path) -> None:
    """25 lines in each of three levels were 15,625 readings of the last."""
    for level, deeper in enumerate(("two", "three", "four")):
        (tmp_path / f"{('one', 'two', 'three')[level]}.txt").write_text(f"-r {deeper}.txt\n" * 25)
    (tmp_path / "four.txt").write_text("numpy\npandas\n" * 25)
    needs = requirements.read(a_model(tmp_path, requirements_txt="-r requirements.txt\n-r one.txt\n-c four.txt\n"))
    assert needs == Needs(requirements=("numpy", "pandas"), constraints=("numpy", "pandas"))


def test_files_that_lead_too_deep_or_are_too_large_together_are_refused(tmp_path: Path) -> None:
    for number in range(6):
        (tmp_path / f"deep{number}.txt").write_text(f"-r deep{number + 1}.txt\n")
    with pytest.raises(UnusableRequirements, match="more than 4 deep"):
        requirements.read(a_model(tmp_path, requirements_txt="-r deep0.txt"))
    for number in range(3):
        (tmp_path / f"large{number}.txt").write_text(("#" * 3_999 + "\n") * 100)
    with pytest.raises(UnusableRequirements, match="larger than 1 MiB together"):
        requirements.read(a_model(tmp_path, requirements_txt="-r large0.txt\n-r large1.txt\n-r large2.txt"))


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "requirements.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UnusableRequirements, match="UTF-8"):
        requirements.read(tmp_path)


# --- whether that is there ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("needs", "reasons"),
    [
        (Needs(), []),
        (Needs(python="3.11", requirements=("numpy", "pandas>=2,<3", "mlflow==3.1.0")), []),
        (Needs(python="3.12"), ["Python 3.12 is asked for, and this is 3.11.7"]),
        (Needs(requirements=("pandas==2.1.0",)), ["pandas==2.1.0 is asked for, and 2.2.3 is installed"]),
        (Needs(requirements=("Torch",)), ["Torch is not installed"]),
        (Needs(requirements=("torch; python_version < '3'",)), []),
        (Needs(requirements=("mlflow==3.0.0",)), ["mlflow==3.0.0 is asked for, and 3.1.0 is installed"]),
        (Needs(requirements=("mlflow[genai]==3.1.0",)), ["mlflow is not installed"]),
        (Needs(constraints=("pandas<2", "torch<1")), ["pandas<2 is asked for, and 2.2.3 is installed"]),
        (Needs(wheels=(Path("own.whl"),)), ["own.whl comes with the model"]),
        (Needs(requirements=("numpy>=2.0",)), []),  # what is installed may be a release candidate
        (
            Needs(requirements=("numpy[fast]",)),
            ["numpy[fast] is not installed", "blas>=2 is asked for, and 1.0 is installed"],
        ),
    ],
)
def test_every_reason_is_given(needs: Needs, reasons: list[str]) -> None:
    find = Distributions(numpy="2.1rc1", pandas="2.2.3", mlflow_skinny="3.1.0", blas="1.0")
    find.needs["numpy"] = ["blas>=2; extra == 'fast'", "torch; extra == 'other'", "absent; python_version < '3'"]
    assert requirements.missing(needs, python="3.11.7", find=find) == reasons


def test_an_extra_that_is_wholly_there_is_met() -> None:
    find = Distributions(numpy="2.1", blas="2.0")
    find.needs["numpy"] = ["blas>=2; extra == 'fast'", "numpy[fast]; extra == 'fast'"]
    find.extras["numpy"] = ["fast"]
    assert requirements.missing(Needs(requirements=("numpy[fast]",)), python="3.11.7", find=find) == []
