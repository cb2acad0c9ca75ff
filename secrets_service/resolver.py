"""What a secret reference stands for, to those who may read it.

The rule: every reader must have READ now. Whether a key exists, and whether its value fits an environment, is told only
where those concerned may list the scope.
"""

from __future__ import annotations

from collections.abc import Sequence

from secrets_service import access, names, store
from secrets_service.errors import RightsDamaged, SecretDamaged
from secrets_service.model import (
    FailureKind,
    Permission,
    Reference,
    ReferenceFailure,
    Scope,
    SealedSecret,
    SecretBytes,
    User,
)
from secrets_service.values import SecretValues
from servicekit.storage import Connection


class Failed(Exception):
    """A reference does not resolve."""

    def __init__(self, *failures: ReferenceFailure) -> None:
        super().__init__()
        self.failures = failures


class References:
    """References, checked and opened inside a transaction."""

    def __init__(self, values: SecretValues) -> None:
        self._values = values

    def resolved(
        self, connection: Connection, reference: Reference, *, readers: Sequence[User | None], told: User | None
    ) -> tuple[SealedSecret, SecretBytes] | None:
        """What a reference stands for, which every reader must be able to read; raises Failed.

        The first reader is the creator of the endpoint. None when `told`, to whom the answer goes, may not know what is
        in the scope.
        """
        try:
            return self._checked(connection, reference, readers, told)
        except RightsDamaged:  # of this scope, which closes this one alone
            raise Failed(ReferenceFailure(reference, FailureKind.DAMAGED)) from None

    def _checked(
        self, connection: Connection, reference: Reference, readers: Sequence[User | None], told: User | None
    ) -> tuple[SealedSecret, SecretBytes] | None:
        creator = readers[0]
        if creator is None or not creator.profile.is_active:
            name = creator.profile.name if creator else ""
            raise Failed(ReferenceFailure(reference, FailureKind.CREATOR_INACTIVE, name))
        scope = store.find_scope(connection, names.folded(reference.scope))
        if scope is None:
            raise Failed(ReferenceFailure(reference, FailureKind.SCOPE_MISSING))
        denied = [reader for reader in readers if not _may_read(connection, scope, reader)]
        if denied:
            raise Failed(
                *(
                    ReferenceFailure(reference, FailureKind.NOT_PERMITTED, reader.profile.name if reader else "")
                    for reader in denied
                )
            )
        if told not in readers and not _may_read(connection, scope, told):
            return None
        return self._text(connection, scope, reference)

    def _text(self, connection: Connection, scope: Scope, reference: Reference) -> tuple[SealedSecret, SecretBytes]:
        sealed = store.find_secret(connection, scope, names.folded(reference.key))
        if sealed is None:
            raise Failed(ReferenceFailure(reference, FailureKind.KEY_MISSING))
        try:
            value = self._values.open(scope, sealed)
        except SecretDamaged:
            raise Failed(ReferenceFailure(reference, FailureKind.DAMAGED)) from None
        if not _fits_environment(value):
            raise Failed(ReferenceFailure(reference, FailureKind.NOT_TEXT))
        return sealed, value


def _may_read(connection: Connection, scope: Scope, user: User | None) -> bool:
    if user is None:
        return False
    row = store.find_scope_and_standing(connection, names.folded(scope.name), user.id)
    return row is not None and access.allows(row[1], Permission.READ)


def _fits_environment(value: SecretBytes) -> bool:
    """Whether a value can be an environment variable: UTF-8 without NUL."""
    try:
        return "\0" not in value.reveal().decode()
    except UnicodeDecodeError:
        return False
