"""Text that is not Unicode: found before SentencePiece sees it."""

from dist_lm.errors import UserError


def utf8(text: str, name: str) -> bytes:
    """`text` in UTF-8.

    Raises:
        UserError: `text` holds a lone surrogate; the message names it and where it is in `name`.
    """
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{name}: character {error.start} is the lone surrogate U+{ord(text[error.start]):04X}, which "
            "no UTF-8 file can hold: read the text strictly, or replace what is not Unicode"
        ) from None
