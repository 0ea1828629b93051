"""A scripted model and scripted tools taking turns."""

import pytest

from dist_lm.chat.messages import Call, ChatError, Conversation, Message, Tool, check_conversation
from dist_lm.tools.use.loop import converse

TOOLS = (Tool("add", "", {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}),)
ASKED = Conversation((Message("user", "?"),), TOOLS)
WORDS = Message("assistant", "It is 3.")


def calling(*arguments: dict) -> Message:
    return Message("assistant", calls=tuple(Call("add", one) for one in arguments))


def play(*turns: Message | ChatError | None, max_rounds: int = 3):
    """(the exchange, calls that were run, what was noted)."""
    script, run, noted = list(turns), [], []

    def ask(conversation: Conversation) -> Message | None:
        check_conversation(conversation)
        turn = script.pop(0)
        if isinstance(turn, ChatError):
            raise turn
        return turn

    def execute(call: Call) -> int:
        run.append(call)
        return call.arguments["x"] + 1

    exchange = converse(
        ASKED,
        ask,
        execute,
        max_rounds,
        on_call=lambda call: noted.append(call),
        on_result=lambda call, result: noted.append(result),
    )
    return exchange, run, noted


def test_results_go_back_until_the_model_answers():
    exchange, run, noted = play(calling({"x": 1}), calling({"x": 2}, {"x": 5}), WORDS)
    assert (exchange.ending, exchange.answer, exchange.rounds) == ("answered", "It is 3.", 2)
    assert exchange.conversation.messages[1:] == (
        *(calling({"x": 1}), Message("tool", results=(2,))),
        *(calling({"x": 2}, {"x": 5}), Message("tool", results=(3, 6)), WORDS),
    )
    assert [call.arguments["x"] for call in run] == [1, 2, 5]
    assert noted == [run[0], 2, run[1], 3, run[2], 6]


def test_an_answer_without_calls_runs_nothing():
    exchange, run, _ = play(WORDS)
    assert (exchange.ending, exchange.rounds, run) == ("answered", 0, [])


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (Call("add", {"x": "1"}), "argument x: expected integer"),
        (Call("add", {}), "argument x: missing"),
        (Call("add", {"x": 1, "y": 1}), "argument y: the tool has none of that name"),
        (Call("subtract", {"x": 1}), "there is no tool 'subtract'"),
    ],
)
def test_a_call_that_does_not_fit_is_not_run_and_the_model_is_told(call, error):
    exchange, run, _ = play(Message("assistant", calls=(call,)), WORDS)
    assert run == []
    (result,) = exchange.conversation.messages[2].results
    assert result["error"].startswith(error)
    assert exchange.ending == "answered"


def test_the_same_refused_calls_twice_in_a_row_end_it():
    wrong, other = calling({"y": 1}, {}), calling({"y": 2})
    exchange, run, noted = play(wrong, other, wrong, wrong, WORDS, max_rounds=9)
    assert (exchange.ending, exchange.rounds, exchange.answer, run) == ("refused", 4, "", [])
    assert len(noted) == 2 * 7  # what is refused is seen
    check_conversation(exchange.conversation)
    partly = calling({"y": 1}, {"x": 1})
    for turn in (partly, calling({"x": 1})):
        assert play(turn, turn, WORDS)[0].ending == "answered"
    words_between = Message("assistant", "Once more.", wrong.calls)
    assert play(wrong, words_between)[0].ending == "refused"


def test_rounds_are_limited():
    exchange, run, _ = play(*[calling({"x": 1})] * 9, max_rounds=3)
    assert (exchange.ending, exchange.rounds, exchange.answer, len(run)) == ("rounds", 3, "", 3)
    check_conversation(exchange.conversation)


def test_what_is_no_turn_ends_it_and_leaves_what_was_whole():
    exchange, _, _ = play(calling({"x": 1}), ChatError("token 3: no JSON"))
    assert (exchange.ending, exchange.note, exchange.answer) == ("no turn", "token 3: no JSON", "")
    check_conversation(exchange.conversation)
    assert play(None)[0].ending == "stopped"
