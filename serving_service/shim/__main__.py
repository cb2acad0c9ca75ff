"""Starts a shim: `python -I -S <this file>`, with its spec on standard input.

Before it lets its starter go it owns both sockets; so whoever started it can talk to it, and to the model's queue, as
soon as the starter has seen this program's first process end.
"""

import os
import sys
from pathlib import Path

# An isolated interpreter knows the standard library alone; that stays first, our own package comes behind it.
sys.path.append(str(Path(__file__).resolve().parents[2]))

from serving_service.shim import life
from serving_service.shim.spec import IncompleteSpecError, read_spec


def main() -> int:
    life.limited()
    try:
        spec = read_spec(sys.stdin.buffer)
        sockets = life.bound(spec)
    except (IncompleteSpecError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    if os.fork():
        os._exit(0)
    life.live(spec, sockets)
    return 0


if __name__ == "__main__":
    sys.exit(main())
