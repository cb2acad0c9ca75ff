"""Which launches may be forked, and which processes."""

import subprocess
import sys
from pathlib import Path

import pytest

from serving_service.template import is_read_at_start

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    "name",
    [
        *("PYTHONPATH", "PYTHONHASHSEED", "LD_DEBUG", "OMP_NUM_THREADS", "OPENBLAS_CORETYPE", "MKL_NUM_THREADS"),
        *("MALLOC_ARENA_MAX", "MLFLOW_TRACKING_URI", "TZ", "LC_ALL", "LANG", "LANGUAGE", "NPY_DISABLE_CPU_FEATURES"),
        *("OPENSSL_CONF", "CI"),
    ],
)
def test_a_variable_that_is_read_at_the_start_needs_a_start(name: str) -> None:
    assert is_read_at_start(name, {"CI"})


@pytest.mark.parametrize(
    "name", ["OPENAI_API_KEY", "LANGCHAIN_API_KEY", "TZ_NAME", "ci", "MY_LANG", "python_path", "DATABRICKS_HOST", ""]
)
def test_any_other_variable_may_be_set_after_it(name: str) -> None:
    assert not is_read_at_start(name, {"CI"})


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("pass", ""),
        ("threading.Thread(target=time.sleep, args=(60,), daemon=True).start()", "an imported library runs threads: 2"),
        ("subprocess.Popen(['sleep', '1'])", "an imported library started a process"),
        ("left = open('/etc/hostname')", "an imported library keeps files open: ['/etc/hostname']"),
    ],
)
def test_a_process_that_has_more_than_memory_is_not_forked(what: str, said: str) -> None:
    code = (
        f"import subprocess, threading, time; from serving_service.warm import memory; {what}; print(memory._why_not())"
    )
    command = [sys.executable, "-c", f"{code}; import os; sys = os.sys; sys.stdout.flush(); os._exit(0)"]
    found = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True)
    assert found.stdout.strip().startswith(said)
    assert bool(found.stdout.strip()) == bool(said)


def test_names_are_collected_whether_found_or_not_and_only_meanwhile() -> None:
    code = """
import os
from serving_service.warm import memory
os.environ["HERE"] = "1"
with memory._names_read() as names:
    os.environ.get("GET"), os.getenv("GETENV"), "IN" in os.environ, os.environ["HERE"], os.environb.get(b"BYTES")
os.environ.get("LATER")
print(sorted(names))
"""
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "['BYTES', 'GET', 'GETENV', 'HERE', 'IN']"
