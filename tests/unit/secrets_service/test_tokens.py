"""How tokens look, and that only the right one matches what is stored."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secrets_service import tokens
from secrets_service.model import SecretBytes, TokenKind, TokenMac
from secrets_service.tokens import Presented, TokenMacs

MACS = TokenMacs({2: SecretBytes(b"m" * 32), 1: SecretBytes(b"o" * 32)})


def test_token_has_the_documented_prefix_and_only_letters_and_digits() -> None:
    text = tokens.make().text
    assert text.startswith("dapi")
    assert len(text) == 65
    assert set(text) <= set(string.ascii_letters + string.digits)


@given(st.binary(min_size=32, max_size=32))
def test_token_is_parsed_back(secret: bytes) -> None:
    token = Presented("0" * 12, SecretBytes(secret))
    parsed = tokens.parse(token.text)
    assert parsed is not None
    assert (parsed.id, parsed.secret.reveal()) == (token.id, secret)


def test_no_single_typing_mistake_passes_the_check_sum() -> None:
    text = tokens.make().text
    for position in range(len(text)):
        for character in "0aZ":
            if character != text[position]:
                assert tokens.parse(text[:position] + character + text[position + 1 :]) is None


@pytest.mark.parametrize("text", ["", "dapi", "dapi" + "0" * 61, "dapi" + "é" * 61, "x" * 65, "dapi" + "z" * 100])
def test_other_text_is_no_token(text: str) -> None:
    assert tokens.parse(text) is None


def test_other_characters_are_refused_whatever_the_check_sum_says() -> None:
    for body in ("dapi" + "-" * 12 + "0" * 43, "dapi" + "0" * 12 + "é" * 43):
        assert tokens.parse(body + tokens._check_sum(body)) is None


def test_number_of_more_than_256_bits_is_no_token() -> None:
    body = "dapi" + "0" * 12 + "z" * 43
    assert tokens.parse(body + tokens._check_sum(body)) is None


@given(st.text(max_size=80))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    assert tokens.parse("dapi" + text) is None or len(text) == 61


def test_only_the_right_secret_under_the_right_id_matches() -> None:
    token, other = tokens.make(), tokens.make()
    stored, candidates = MACS.of(token), MACS.candidates(token)
    assert tokens.is_one_of(candidates, stored)
    for wrong in (other, Presented(other.id, token.secret), Presented(token.id, other.secret)):
        assert not tokens.is_one_of(MACS.candidates(wrong), stored)
    assert not tokens.is_one_of(candidates, None)
    assert not tokens.is_one_of((TokenMac(2, bytes(32)),), None)
    assert not tokens.is_one_of(TokenMacs({2: SecretBytes(b"M" * 32)}).candidates(token), stored)


def test_mac_of_every_version_matches_as_what_it_is_and_new_ones_are_of_the_newest() -> None:
    token = tokens.make()
    old, new = MACS.candidates(token)
    assert (old.version, new.version, MACS.current) == (1, 2, 2)
    assert new == MACS.of(token)
    for stored in (old, new):
        assert tokens.is_one_of((old, new), stored)
        for version in {0, 1, 2, 3} - {stored.version}:
            assert not tokens.is_one_of((old, new), TokenMac(version, stored.mac))


def test_no_two_tokens_are_alike() -> None:
    made = [tokens.make() for _ in range(1_000)]
    assert len({token.id for token in made}) == len({token.secret.reveal() for token in made}) == len(made)


def test_client_secret_has_a_prefix_of_its_own_and_is_parsed_as_nothing_else() -> None:
    secret, token = tokens.make(TokenKind.CLIENT_SECRET), tokens.make()
    assert secret.text.startswith("dose")
    assert tokens.parse(secret.text, TokenKind.CLIENT_SECRET) is not None
    assert tokens.parse(secret.text) is None
    assert tokens.parse(token.text, TokenKind.CLIENT_SECRET) is None


def test_repr_hides_the_secret() -> None:
    token = tokens.make()
    assert token.text not in repr(token)
    assert token.text[16:] not in repr(token)
    assert repr(token.secret) == "SecretBytes(***)"


def test_what_is_known_again_is_what_was_found_at_first_until_the_keys_change() -> None:
    macs = TokenMacs({1: SecretBytes(b"o" * 32)})
    token, other = tokens.make(), tokens.make()
    for _ in range(2):
        assert macs.sought(token.text, TokenKind.PERSONAL) == (token.id, macs.candidates(token))
        assert macs.sought(other.text, TokenKind.PERSONAL) == (other.id, macs.candidates(other))
        assert macs.sought(token.text, TokenKind.CLIENT_SECRET) is None
    macs.use({1: SecretBytes(b"o" * 32), 2: SecretBytes(b"m" * 32)})
    assert macs.sought(token.text, TokenKind.PERSONAL) == (token.id, MACS.candidates(token))


def test_only_so_many_texts_are_known_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "REMEMBERED", 3)
    macs = TokenMacs({1: SecretBytes(b"o" * 32)})
    made = [tokens.make() for _ in range(10)]
    for token in made:
        macs.sought(token.text, TokenKind.PERSONAL)
        assert macs.sought(made[0].text, TokenKind.PERSONAL) == (made[0].id, macs.candidates(made[0]))
    assert len(macs._sought) == 3


@pytest.mark.parametrize("text", ["", "dapi" + "0" * 61, "dapi" + "é" * 61, "dapi" + "\ud800" * 61, "x" * 65])
def test_nothing_is_sought_for_what_is_no_token(text: str) -> None:
    for _ in range(2):
        assert MACS.sought(text, TokenKind.PERSONAL) is None
