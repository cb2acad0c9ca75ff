"""First answers at rest: sealed like every value, since an answer may hold a token and its request a secret."""

from __future__ import annotations

from secrets_service import places
from secrets_service.cipher import Damaged
from secrets_service.errors import AnswerDamaged
from secrets_service.keyring import Keyring
from secrets_service.model import SecretBytes


class AnswerSeal:
    """Seals what `servicekit.once` records."""

    def __init__(self, keyring: Keyring) -> None:
        self._keyring = keyring

    def seal(self, text: bytes, *, place: str) -> bytes:
        """The record of a text, which opens at that place only."""
        return self._keyring.seal(SecretBytes(text), places.answer(place))

    def open(self, record: bytes, *, place: str) -> bytes:
        """The text of a record; raises AnswerDamaged."""
        try:
            return self._keyring.open(record, places.answer(place)).reveal()
        except Damaged:
            raise AnswerDamaged from None
