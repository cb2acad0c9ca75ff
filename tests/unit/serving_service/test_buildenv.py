"""What is made of the output of a build that failed."""

from __future__ import annotations

import pytest

from serving_service.buildenv import BuildDelayed, BuildImpossible, cause_of, failure

CONFLICT = """\
Using Python 3.11.7
error: No solution found when resolving dependencies
  cause: Because all versions of other depend on tiny>=2 and you require tiny==1.0, we can conclude that they clash.
         And because you require other, we can conclude that your requirements are unsatisfiable.

hint: none
"""
REFUSED = """\
error: Request failed after 3 retries in 7.6s
  cause: Failed to fetch: http://127.0.0.1:9/simple/tiny/
  cause: Connection refused (os error 111)
"""
FORBIDDEN = """\
error: Failed to fetch: `https://example.com/simple/tiny/`
  cause: HTTP status client error (401 Unauthorized) for url (https://example.com/simple/tiny/)
"""


def test_a_conflict_is_told_whole_in_one_line() -> None:
    assert cause_of(CONFLICT) == (
        "Because all versions of other depend on tiny>=2 and you require tiny==1.0, we can conclude that they clash."
        " And because you require other, we can conclude that your requirements are unsatisfiable."
    )


@pytest.mark.parametrize(
    ("said", "kind", "told"),
    [
        (CONFLICT, BuildImpossible, "The build log says more."),
        (REFUSED, BuildDelayed, "cannot be reached just now: Request failed after 3 retries in 7.6s: Failed to fetch"),
        (FORBIDDEN, BuildImpossible, "401 Unauthorized"),
        ("error: Failed to copy\n  cause: No space left on device (os error 28)\n", BuildDelayed, "disk"),
        ("", BuildImpossible, "uv ended with status 9"),
    ],
)
def test_a_failure_is_final_or_not_by_its_cause(said: str, kind: type[Exception], told: str) -> None:
    found = failure(said, "uv ended with status 9")
    assert isinstance(found, kind)
    assert told in str(found)


def test_an_endless_cause_is_cut() -> None:
    assert len(cause_of(f"error: No solution found\n  cause: {'x' * 10_000}\n")) <= 601
