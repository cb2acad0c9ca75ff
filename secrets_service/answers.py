"""First answers at rest: sealed like every value, since an answer may hold a token and its request a secret."""

from __future__ import annotations

from secrets_service.cipher import Cipher, Damaged, Place
from secrets_service.errors import AnswerDamaged
from secrets_service.model import SecretBytes


class AnswerSeal:
    """Seals what `servicekit.once` records."""

    def __init__(self, cipher: Cipher) -> None:
        self._cipher = cipher

    def seal(self, text: bytes, *, place: str) -> bytes:
        """The record of a text, which opens at that place only."""
        return self._cipher.seal(SecretBytes(text), _place(place))

    def open(self, record: bytes, *, place: str) -> bytes:
        """The text of a record; raises AnswerDamaged."""
        try:
            return self._cipher.open(record, _place(place)).reveal()
        except Damaged:
            raise AnswerDamaged from None


def _place(place: str) -> Place:
    return Place(kind="answer", key=place)
