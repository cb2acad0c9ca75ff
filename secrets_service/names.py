"""Names as callers write them: checked and normalised once, here, before anything compares them.

Scope and key names are ASCII and looked up in lower case. User names are any text: NFC as shown, casefolded as
compared.
"""

from __future__ import annotations

import re
import unicodedata

from servicekit.errors import InvalidParameter

LONGEST_NAME = 128
LONGEST_TEXT = 255

_SCOPE = re.compile(r"[A-Za-z0-9_.@-]{1,128}")
_KEY = re.compile(r"[A-Za-z0-9_.-]{1,128}")
# Control and invisible formatting characters, separators of lines: what makes two names look like one, or breaks a log.
_UNSHOWABLE = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


def scope_name(text: str) -> str:
    """A scope's name, as given; raises InvalidParameter."""
    if not _SCOPE.fullmatch(text):
        raise InvalidParameter(f"scope: a name has 1 to {LONGEST_NAME} of the characters A-Z a-z 0-9 _ . @ -")
    return text


def key_name(text: str) -> str:
    """A key, as given; raises InvalidParameter."""
    if not _KEY.fullmatch(text):
        raise InvalidParameter(f"key: a name has 1 to {LONGEST_NAME} of the characters A-Z a-z 0-9 _ . -")
    return text


def folded(name: str) -> str:
    """The form in which a checked scope or key name is looked up."""
    return name.lower()


def principal_name(field: str, text: str) -> str:
    """The name of a user or group, in NFC; raises InvalidParameter that names the field."""
    name = unicodedata.normalize("NFC", text)
    if not 1 <= len(name) <= LONGEST_TEXT:
        raise InvalidParameter(f"{field}: a name has 1 to {LONGEST_TEXT} characters.")
    if name != name.strip() or not _is_showable(name):
        raise InvalidParameter(f"{field}: a name has no control characters and no white space around it.")
    return name


def folded_principal(name: str) -> str:
    """The form in which a checked principal name is compared."""
    if name.isascii():  # the same, and filters ask for it ten thousand times
        return name.lower()
    return unicodedata.normalize("NFC", name.casefold())


def short_text(field: str, text: str) -> str:
    """Free text such as a comment, as given; raises InvalidParameter when it is too long."""
    if len(text) > LONGEST_TEXT:
        raise InvalidParameter(f"{field}: at most {LONGEST_TEXT} characters.")
    return text


def label(field: str, text: str) -> str:
    """Text that is shown beside names, such as a display name, in NFC; may be empty. Raises InvalidParameter."""
    shown = unicodedata.normalize("NFC", text)
    if len(shown) > LONGEST_TEXT or not _is_showable(shown):
        raise InvalidParameter(f"{field}: at most {LONGEST_TEXT} characters, none of them a control character.")
    return shown


def is_id(text: str) -> bool:
    """Whether a text can be a principal's id: decimal digits that fit the database's integers."""
    return text.isascii() and text.isdigit() and len(text) <= 18


def _is_showable(text: str) -> bool:
    return not any(unicodedata.category(character) in _UNSHOWABLE for character in text)
