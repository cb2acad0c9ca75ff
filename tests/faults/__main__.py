"""`python -m tests.faults [NAME ...]`: plants bugs in a copy of the tree, and fails when the tests miss one (R30)."""

from __future__ import annotations

import argparse
import sys

from tests.faults.run import run
from tests.faults.table import FAULTS, as_markdown


def main() -> int:
    """Runs the faults that are named, or all."""
    by_name = {fault.name: fault for fault in FAULTS}
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description="Plants bugs that tests must notice.")
    parser.add_argument("name", nargs="*", help="a fault; all by default")
    parser.add_argument("--list", action="store_true", help="print the table for tests/README.md, and run nothing")
    options = parser.parse_args()
    if options.list:
        sys.stdout.write(as_markdown())
        return 0
    if unknown := set(options.name) - by_name.keys():
        parser.error(f"no such fault: {', '.join(sorted(unknown))}")
    return 1 if run([by_name[name] for name in options.name] or list(FAULTS)) else 0


if __name__ == "__main__":
    sys.exit(main())
