"""The text of a turn that a client sees while it grows."""

import pytest

from dist_lm.server.turns import VisibleText
from dist_lm.storage.run_directory import WorkDirectory
from dist_lm.tokenizer.tokenizer import Tokenizer

CALL = '<tool_call>\n{"name": "a", "arguments": {}}\n</tool_call>'


@pytest.mark.parametrize("has_mark", [True, False])
@pytest.mark.parametrize(
    ("text", "called", "shown"),
    [
        ("Let me see.", False, "Let me see."),
        ("Two lines\nand an end\n", False, "Two lines\nand an end\n"),
        ("Let me see.\n", True, "Let me see."),
        ("Let me see.\n\n", True, "Let me see.\n"),
        ("", True, ""),
        ("1 < 2, <tool and <tool_cal", False, "1 < 2, <tool and <tool_cal"),
    ],
)
def test_no_part_of_a_call_is_shown(tiny_work: WorkDirectory, has_mark: bool, text: str, called: bool, shown: str):
    """However the text is cut, whether the mark of a call is a token or spelled."""
    tokenizer = Tokenizer.load(tiny_work.tokenizer_model)
    mark = tokenizer.special_ids["<tool_call>"]
    if not has_mark:
        del tokenizer.special_ids["<tool_call>"]
    for size in (1, 2, 3, 100):
        pieces = [(0, text[begin : begin + size]) for begin in range(0, len(text), size)]
        if called and has_mark:
            pieces += [(mark, ""), (0, "\n{"), (0, "}")]
        elif called:
            whole = text + CALL
            pieces = [(0, whole[begin : begin + size]) for begin in range(0, len(whole), size)]
        visible = VisibleText(tokenizer)
        seen = "".join(visible.add(token, piece) for token, piece in pieces)
        assert seen + visible.end() == shown
