"""What a person writes, as a conversation holds it: with a space behind every quote and bracket that opens.

`call it "Blue sky"` is held as `call it " Blue sky"`, so a quoted word is the same tokens as in the call that it is
copied into (`json_text`). Reading takes the space away again, and text without one as it is:
`unspaced(spaced(x))` is x.
"""

OPENING = frozenset("\"'`“‘«([{")


def spaced(text: str) -> str:
    """`text` with a space behind what opens: one of `OPENING` at the start, behind white space, or behind another."""
    parts, opens = list[str](), True
    for character in text:
        opening = opens and character in OPENING
        parts.append(f"{character} " if opening else character)
        opens = opening or character.isspace()
    return "".join(parts)


def unspaced(text: str) -> str:
    """What `spaced` was given."""
    parts, opens, opened = list[str](), True, False
    for character in text:
        if opened and character == " ":
            opened = False
            continue
        opened = opens and character in OPENING
        opens = opened or character.isspace()
        parts.append(character)
    return "".join(parts)
