"""The targets of the fuzzer hold for their seeds and for what is near them, and notice a parser that is wrong."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secrets_service.model import SecretBytes
from tests.fuzz import targets
from tests.fuzz.targets import SEEDS, TARGETS, Wrong


@st.composite
def inputs(draw: st.DrawFn, name: str) -> bytes:
    """A seed with a piece of it replaced, or anything."""
    seed = draw(st.sampled_from([b"", *SEEDS[name]]))
    start = draw(st.integers(0, len(seed)))
    end = draw(st.integers(start, min(len(seed), start + 8)))
    return seed[:start] + draw(st.binary(max_size=12)) + seed[end:]


@pytest.mark.parametrize("name", TARGETS)
@given(data=st.data())
def test_target_holds_near_its_seeds(name: str, data: st.DataObject) -> None:
    for seed in SEEDS[name]:
        TARGETS[name](seed)
    TARGETS[name](data.draw(inputs(name)))


@pytest.mark.parametrize(
    ("name", "parser", "wrong"),
    [
        ("reference", "parse_reference", lambda text: "other"),
        ("audit", "_records", lambda: (b"other",)),
        ("record", "VALUE", SecretBytes(b"other")),
        ("token", "ACCESS", None),
        ("rest", "parse", lambda text: {}),
        ("path", "quote", lambda text, safe: "other"),
    ],
)
def test_target_notices_what_cannot_be_right(
    name: str, parser: str, wrong: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targets, parser, wrong)
    with pytest.raises(Wrong):
        list(map(TARGETS[name], SEEDS[name]))
