"""`tessera demo`: succeeds from nothing, proves what it says, and leaves nothing behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.support import processes
from tests.support.stack import clean_environment

DEMO = [sys.executable, "-P", "-m", "tessera.cli", "demo"]


def _start(folder: Path) -> subprocess.Popen[str]:
    environment = {**clean_environment(), "TMPDIR": str(folder)}
    return subprocess.Popen(
        DEMO, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )


def test_demo_ends_with_a_prediction_that_proves_the_secret_and_leaves_nothing() -> None:
    with tempfile.TemporaryDirectory(prefix="t-", dir="/tmp") as name:
        folder = Path(name)
        demo = _start(folder)
        output, _ = demo.communicate(timeout=120)
        assert demo.returncode == 0, output
        (ours,) = re.findall(r"a random value with fingerprint ([0-9a-f]{12})", output)
        answers = re.findall(r'"key_fingerprint": "([0-9a-f]*)".*"version": "(\d)"', output)
        assert answers == [("", "1"), (ours, "1"), (ours, "2")]
        assert "none failed" in output
        assert list(folder.iterdir()) == []
        assert processes.of_directory(folder) == {}


def test_interrupted_demo_fails_and_leaves_nothing() -> None:
    with tempfile.TemporaryDirectory(prefix="t-", dir="/tmp") as name:
        folder = Path(name)
        demo = _start(folder)
        assert demo.stdout is not None
        for line in demo.stdout:
            if "POST" in line:  # an endpoint is being created
                break
        os.kill(demo.pid, signal.SIGINT)
        output, _ = demo.communicate(timeout=30)
        assert demo.returncode == 1, output
        assert "Traceback" not in output
        assert list(folder.iterdir()) == []
        assert processes.of_directory(folder) == {}
