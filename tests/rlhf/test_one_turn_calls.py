"""Tasks of one turn for SmolLM2: no reward without a choice, and held-out requests that nothing was trained on."""

from dist_lm.chat.messages import Call
from tests.rlhf.one_turn_calls import RIGHT_TOOL, SIZES, reward_of, tasks

SEED = 0


def test_only_one_call_without_fault_earns_everything():
    """Finds rewards for calling all tools, for the other tool, or for a turn without calls."""
    (task,) = tasks(SEED, "train", 1)
    right = Call(**task["call"])
    (other,) = (name for name in task["tools"] if name != right.name)
    wrong = Call(right.name, dict.fromkeys(right.arguments, "no such word"))
    assert [reward_of(calls, right, exact=False) for calls in ((right,), (wrong,))] == [1.0, RIGHT_TOOL]
    assert reward_of((wrong,), right, exact=True) == 0
    for calls in ((), (right, right), (Call(other, right.arguments),)):
        assert reward_of(calls, right, exact=False) == 0


def test_held_out_requests_have_words_and_numbers_of_their_own():
    """Finds a held-out reward that measures what was trained on."""
    values = {
        part: {value for task in tasks(SEED, part, size) for value in task["call"]["arguments"].values()}
        for part, size in SIZES.items()
    }
    assert all(values.values())
    assert values["train"].isdisjoint(values["held_out"])
