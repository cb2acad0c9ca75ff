"""What a service makes of its process before it does anything."""

from __future__ import annotations

import subprocess
import sys


def test_service_may_have_as_many_files_open_as_its_user_may() -> None:
    program = """
import resource
from servicekit import process
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 4096))
process._open_more_files()
print(*resource.getrlimit(resource.RLIMIT_NOFILE))
"""
    said = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert said.split() == ["4096", "4096"]
