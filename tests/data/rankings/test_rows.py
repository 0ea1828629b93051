"""Rows of public data sets as rankings."""

from dist_lm.chat.messages import Conversation, Message
from dist_lm.chat.ranking import Judgement, Ranking
from dist_lm.data.sources.hub_rankings import helpsteer_ranking, hh_ranking, oasst_rankings, ultrafeedback_ranking


def asked(*texts: str) -> Conversation:
    """Turns of user and assistant in turn."""
    return Conversation(tuple(Message("assistant" if n % 2 else "user", text) for n, text in enumerate(texts)))


def message(name: str, parent: str | None, text: str, rank: int | None = None, **more) -> dict:
    role = "assistant" if name.startswith("a") else "prompter"
    row = {"message_id": name, "parent_id": parent, "text": text, "role": role, "rank": rank, "lang": "en"}
    return row | {"message_tree_id": "tree", "deleted": False} | more


def test_answers_of_one_message_are_ranked_as_people_did():
    tree = [
        message("p0", None, "Hello"),
        message("a1", "p0", "Go away", rank=1),
        message("a0", "p0", "Hi!", rank=0),
        message("a2", "p0", "Deleted", rank=2, deleted=True),
        message("p1", "a0", "Again"),
        message("a3", "p1", "Hi again", rank=0),
        message("a4", "p1", "No", rank=2),
        message("a5", "p1", "Hm", rank=1),
    ]
    other = [
        message("p9", None, "Hallo", message_tree_id="other", lang="de"),
        message("a9", "p9", "Ja?", rank=0, message_tree_id="other", lang="de"),
        message("a8", "p9", "Nein", rank=1, message_tree_id="other", lang="de"),
    ]
    first = Ranking(asked("Hello"), ("Hi!", "Go away"), (0, 1))
    second = Ranking(asked("Hello", "Hi!", "Again"), ("Hi again", "Hm", "No"), (0, 1, 2))
    third = Ranking(asked("Hallo"), ("Ja?", "Nein"), (0, 1))
    assert list(oasst_rankings([*tree, *other])) == [("en", first), ("en", second), ("de", third)]
    assert list(oasst_rankings([*tree, *other], frozenset({"de"}))) == [("de", third)]


def test_a_message_with_one_answer_or_below_a_deleted_one_gives_nothing():
    rows = [
        message("p0", None, "Hello"),
        message("a0", "p0", "Hi", rank=0, deleted=True),
        message("p1", "a0", "Again"),
        message("a1", "p1", "One", rank=0),
        message("a2", "p1", "Two", rank=1),
        message("p2", None, "Alone"),
        message("a3", "p2", "Only", rank=0),
    ]
    assert list(oasst_rankings(rows)) == []


def test_dialogues_that_differ_in_the_last_answer():
    row = {
        "chosen": "\n\nHuman: A?\n\nAssistant: B.\n\nHuman: C?\n\nAssistant: Good: Human: is no turn.",
        "rejected": "\n\nHuman: A?\n\nAssistant: B.\n\nHuman: C?\n\nAssistant: Bad.",
    }
    assert hh_ranking(row) == Ranking(asked("A?", "B.", "C?"), ("Good: Human: is no turn.", "Bad."), (0, 1))
    earlier = {"chosen": row["chosen"], "rejected": "\n\nHuman: A?\n\nAssistant: Other.\n\nHuman: C?\n\nAssistant: D."}
    assert hh_ranking(earlier) is None
    assert hh_ranking({"chosen": "no dialogue", "rejected": row["rejected"]}) is None
    assert hh_ranking({**row, "rejected": row["chosen"].rpartition("Good")[0]}) is None  # an empty answer


def test_preferences_with_a_strength_are_judgements_with_a_margin():
    row = {"context": [{"role": "user", "content": "Q"}], "response1": "first", "response2": "second"}
    found = helpsteer_ranking(row | {"overall_preference": -2})
    assert found == Ranking(asked("Q"), ("first", "second"), judgements=(Judgement(0, 1, 2.0),))
    found = helpsteer_ranking(row | {"overall_preference": 3})
    assert found is not None
    assert found.judgements == (Judgement(1, 0, 3.0),)
    assert helpsteer_ranking(row | {"overall_preference": 0}) is None


def test_scores_become_ranks_and_equal_ones_ties():
    scores = {"a": 7.5, "b": 9.0, "c": 7.5, "d": None}
    row = {"instruction": "Q", "completions": [{"response": k, "overall_score": v} for k, v in scores.items()]}
    assert ultrafeedback_ranking(row) == Ranking(asked("Q"), ("a", "b", "c"), (1, 0, 1))
    tied = {"instruction": "Q", "completions": [{"response": k, "overall_score": 5} for k in "ab"]}
    assert ultrafeedback_ranking(tied) is None


def test_a_dialogue_that_the_assistant_opens_is_no_prompt():
    opened = [{"role": "assistant", "content": "Hello!"}, {"role": "user", "content": "Hi"}]
    row = {"response1": "a", "response2": "b", "overall_preference": 2}
    for context in (opened, opened[:1]):
        assert helpsteer_ranking(row | {"context": context}) is None
    assert helpsteer_ranking(row | {"context": opened[1:]}) is not None
