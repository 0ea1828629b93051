"""Names the marks of the formats, and the pieces of a vocabulary that we train: special tokens and symbols of code.

Ids 0, 1, 2, ... of a trained vocabulary are the special tokens in the order of `SPECIAL_TOKENS`. They are control
symbols of SentencePiece: no text is ever encoded to one of them, not even text that spells its name.
"""

END_OF_TEXT = "<|endoftext|>"  # opens every document, and ends a generation
PAD = "<|pad|>"  # fills a batch; no document holds it
UNKNOWN = "<|unknown|>"  # SentencePiece requires one; byte pieces make it unreachable

START, END = "<|im_start|>", "<|im_end|>"  # begin and end a turn
TOOLS, END_TOOLS = "<tools>", "</tools>"  # stand around the tools that may be called, in the system turn
CALL, END_CALL = "<tool_call>", "</tool_call>"
RESPONSE, END_RESPONSE = "<tool_response>", "</tool_response>"  # stand around the result of a call

# Fill in the middle and repositories, with the names of Qwen2.5-Coder.
FIM_PREFIX, FIM_MIDDLE, FIM_SUFFIX = "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"
REPOSITORY, FILE = "<|repo_name|>", "<|file_sep|>"

_FORMAT_MARKS = (
    *(START, END, TOOLS, END_TOOLS, CALL, END_CALL, RESPONSE, END_RESPONSE),
    *(FIM_PREFIX, FIM_MIDDLE, FIM_SUFFIX, REPOSITORY, FILE),
)
SPECIAL_TOKENS = (END_OF_TEXT, PAD, UNKNOWN, *_FORMAT_MARKS, *map("<|reserved_{}|>".format, range(16)))

# Names of the same marks in other tokenizers; the first one that a tokenizer has is used. The last name of end-of-text
# is DeepSeek's.
ALIASES = {
    END_OF_TEXT: ("<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<｜end\u2581of\u2581sentence｜>"),
    FIM_PREFIX: ("<fim_prefix>",),
    FIM_MIDDLE: ("<fim_middle>",),
    FIM_SUFFIX: ("<fim_suffix>",),
    REPOSITORY: ("<repo_name>",),
    FILE: ("<file_sep>",),
}
# `tokenizer.add_marks` appends these marks to a tokenizer that lacks them.
MARKS = (END_OF_TEXT, PAD, *_FORMAT_MARKS)
# No text of another tokenizer becomes one of these, even where that tokenizer would read it so.
NEVER_TEXT = frozenset(MARKS).union(*ALIASES.values())

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
INDENTS = (*map("\n".ljust, range(3, 26, 2)), "\n\t", "\n\t\t", "\n\t\t\t")  # 2 to 24 spaces, 1 to 3 tabs

# Operators are no symbols: `train_tokenizer` makes sure that they are learned. As symbols they would overlap (`!=` ends
# as `==` begins), cut rulers such as `=====` into pairs, and part from the space before them.
OPERATORS = (
    *("==", "!=", ">=", "<=", "===", "!==", "<>", "=~"),
    *("+=", "-=", "*=", "/=", "%=", "|=", "&=", "^=", "//=", "**=", "<<=", ">>="),
    *("->", "=>", ":=", "::", "++", "&&", "||", "<<", ">>"),
)


def user_defined_symbols() -> list[str]:
    """Returns the symbols that are never split, with spaces written as U+2581 (a plain space would never match).

    SentencePiece takes the longest symbol at each place, from left to right. Other engines take the longest symbol of
    the whole text first. Both find the same symbols because no proper suffix of a symbol begins another symbol.
    """
    return [symbol.replace(" ", SPACE) for symbol in (*SHEBANGS, *INDENTS)]
