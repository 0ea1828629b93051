"""Pieces that are in every vocabulary whatever the text says: special tokens, symbols of code and JSON kept whole.

Ids 0, 1, 2, ... are the special tokens in the order of `SPECIAL_TOKENS`, the same in every tokenizer. They
are control symbols of SentencePiece: no text, not even one that spells their name, is ever encoded to them.
"""

END_OF_TEXT = "<|endoftext|>"  # opens every document, and ends a generation
PAD = "<|pad|>"  # fills a batch; no document holds it
UNKNOWN = "<|unknown|>"  # SentencePiece insists on one; byte pieces make it unreachable

SPECIAL_TOKENS = (
    END_OF_TEXT,
    PAD,
    UNKNOWN,
    "<|system|>",  # roles: each opens a turn
    "<|user|>",
    "<|assistant|>",
    "<|tool|>",
    "<|end|>",  # closes a turn
    "<|tool_call|>",
    "<|/tool_call|>",
    "<|tool_result|>",
    "<|/tool_result|>",
    "<|tools|>",  # the list of tools that may be called
    "<|/tools|>",
    *(f"<|reserved_{n}|>" for n in range(16)),
)

SPACE = "\u2581"  # how SentencePiece writes a space inside a piece

SHEBANGS = (
    "#!/bin/bash",
    "#!/bin/sh",
    "#!/usr/bin/bash",
    "#!/usr/bin/env bash",
    "#!/usr/bin/env sh",
    "#!/usr/bin/env python",
    "#!/usr/bin/env python3",
    "#!/usr/bin/python",
    "#!/usr/bin/python3",
)

# A symbol is matched greedily wherever it occurs, so `--`, `**`, `//` and `##` are left to BPE: as symbols
# they would cut rulers and URLs into pairs. Rulers of `=`, which `==` would cut, get their own lengths.
OPERATORS = (
    *("==", "!=", ">=", "<=", "===", "!==", "<>", "=~"),
    *("+=", "-=", "*=", "/=", "%=", "|=", "&=", "^=", "//=", "**=", "<<=", ">>="),
    *("->", "=>", ":=", "::", "++", "&&", "||", "<<", ">>"),
)
RULERS = ("=" * 4, "=" * 8, "=" * 16)

INDENT_WIDTHS = (0, 2, 4, 6, 8, 12, 16, 20)  # spaces after a newline
BLANK_LINE_WIDTHS = (0, 4, 8)  # spaces after an empty line

# Tools, calls and results as `chat/json_text.py` spells them. No tokenizer learns from conversations, so these would be
# two tokens in five of one with tools.
JSON_TYPES = ("string", "integer", "number", "boolean")
JSON_PUNCTUATION = (
    *('{"', '": ', '": "', '": ["', '": {"', ', "', '", "', '["'),
    *('"}', '"}}', "}}", '}, "', '"}, "', '"}}, "', '"]', '"]}', '"], "', '"]}, "'),
    *('": true', '": false', '": null'),
)
CALL_FRAMES = ('{" name": "', '", " arguments": {"', '", " arguments": {}}')
TOOL_FRAMES = (
    *('[{" description": "', '}}}, {" description": "', '"]}}, {" description": "', '"]}}]', '", " name": "'),
    *(
        '", " parameters": {" type": " object", " properties": {"',
        '", " parameters": {" type": " object", " properties": {}}',
    ),
)
ARGUMENT_TYPES = tuple(f'": {{" type": " {name}"' for name in JSON_TYPES)
ARGUMENT_FRAMES = (
    *(f"{argument}{end}" for argument in ARGUMENT_TYPES for end in ("", "}", '}, "', '}}, " required": ["')),
    *('": {" type": " object", " properties": {"', '": {" type": " array", " items": {" type": "'),
    *(', " enum": ["', ', " format": "', ', " description": "', ', " default": ', ', " minimum": ', ', " maximum": '),
    *('], " default": "', '}, " required": ["', '"]}}, " required": ["', '"}}, " required": ["'),
)


def user_defined_symbols() -> list[str]:
    """The symbols kept whole, spaces written as U+2581 (a plain space would never match)."""
    indents = [
        *("\n" + " " * width for width in INDENT_WIDTHS),
        *("\n\n" + " " * width for width in BLANK_LINE_WIDTHS),
        *("\t", "\n\t", "\n\t\t"),
    ]
    spaced = [f" {operator}" for operator in OPERATORS]
    json = [*JSON_PUNCTUATION, *CALL_FRAMES, *TOOL_FRAMES, *ARGUMENT_FRAMES]
    symbols = [*SHEBANGS, *OPERATORS, *RULERS, *spaced, *indents, *json]
    return [symbol.replace(" ", SPACE) for symbol in symbols]
