"""Reads rows in Alpaca's format: an instruction with input, the answer, and earlier turns.

    {"instruction": "Translate to French.", "input": "the bridge", "output": "le pont",
     "system": "Answer in one word.", "history": [["Hello", "Bonjour"]]}

The user's turn is the instruction and, on the next line, the input, as in LLaMA-Factory.
"""

from collections.abc import Mapping

from dist_lm.chat.layouts.tools import tools_of
from dist_lm.chat.layouts.transcript import Transcript, list_of, plain_text, text_of, value_of
from dist_lm.chat.layouts.turns import with_system
from dist_lm.chat.messages import ChatError, Conversation, Json, shown

INSTRUCTION, HISTORY = "instruction", "history"
INPUTS = ("input", "context")  # Alpaca, Dolly
OUTPUTS = ("output", "response")  # Alpaca, Dolly


def fits(row: Mapping[str, Json]) -> bool:
    """Returns whether a row has an instruction and an answer."""
    return INSTRUCTION in row and any(name in row for name in OUTPUTS)


def read(row: Mapping[str, Json], tools: Json = None, system: Json = None) -> Conversation:
    """Returns the conversation of a row: turns of `history`, instruction and input, answer. All answers are learned.

    Args:
        tools, system: the values of the columns of tools and of the text of the system.

    Raises:
        ChatError: a column holds something else than text, or two columns would be the same part.
    """
    transcript = Transcript(tools_of(tools))
    for number, pair in enumerate(list_of(value_of(row.get(HISTORY), HISTORY) or [], HISTORY)):
        where = f"{HISTORY}[{number}]"
        if not isinstance(pair, list) or len(pair) != 2:
            raise ChatError(f"{where}: {shown(pair)}; expected a list of a question and its answer")
        transcript.say("user", plain_text(pair[0], where), where)
        transcript.say("assistant", plain_text(pair[1], where), where)

    parts = [plain_text(row[INSTRUCTION], INSTRUCTION), _one_of(row, INPUTS)]
    transcript.say("user", "\n".join(part for part in parts if part), INSTRUCTION)
    transcript.say("assistant", _one_of(row, OUTPUTS), "the answer")
    return with_system(transcript.conversation(), text_of(system, "system"))


def _one_of(row: Mapping[str, Json], names: tuple[str, ...]) -> str:
    """Returns the text of the one column of `names` that has one; empty if none has.

    Raises:
        ChatError: two have a text, one of which would be lost.
    """
    texts = {name: plain_text(row[name], name) for name in names if row.get(name)}
    if len(texts) > 1:
        raise ChatError(f"the row has {' and '.join(texts)}: expected one of them")
    return next(iter(texts.values()), "")
