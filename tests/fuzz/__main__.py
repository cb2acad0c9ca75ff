"""`python -m tests.fuzz [NAME ...]`: fuzzes parsers, guided by what they cover, one process after the other (S25).

Needs Atheris, which is locked by itself: `make fuzz` installs it. What was found is kept in `.fuzz/`, for the next run.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from tests.fuzz.targets import SEEDS, TARGETS

FOUND = Path(".fuzz")
LONGEST_INPUT = 4_096
RSS_MIB = 1_024
SLOWEST_SECONDS = 5
"""What an input may take; a machine that does other things at the same time counts, too."""

_ONE = """
import sys
import atheris
with atheris.instrument_imports(include=["gateway", "secrets_service", "servicekit", "serving_service", "jwt", "json"]):
    from tests.fuzz.targets import TARGETS
atheris.Setup(sys.argv[:1] + sys.argv[2:], TARGETS[sys.argv[1]])
atheris.Fuzz()
"""


def main() -> int:
    """Fuzzes the targets that are named, or all."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Looks for input that parsers take ill.")
    parser.add_argument("name", nargs="*", choices=[*TARGETS, []], help="a target; all by default")
    parser.add_argument("--seconds", type=int, default=600, help="how long each is fuzzed (default: 600)")
    options = parser.parse_args()
    if find_spec("atheris") is None:
        parser.error("Atheris is not installed; `make fuzz` does that.")
    failed = [name for name in options.name or TARGETS if not _holds(name, options.seconds)]
    for name in failed:
        sys.stdout.write(f"{name} does not hold: see {FOUND / name}\n")
    return 1 if failed else 0


def _holds(name: str, seconds: int) -> bool:
    corpus = FOUND / name / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(SEEDS[name]):
        (corpus / f"seed-{number}").write_bytes(seed)
    bounds = (f"-max_total_time={seconds}", f"-max_len={LONGEST_INPUT}", f"-rss_limit_mb={RSS_MIB}")
    where = (f"-artifact_prefix={FOUND / name}/", str(corpus))
    command = [sys.executable, "-c", _ONE, name, *bounds, f"-timeout={SLOWEST_SECONDS}", "-print_final_stats=1", *where]
    return subprocess.run(command, check=False).returncode == 0


if __name__ == "__main__":
    sys.exit(main())
