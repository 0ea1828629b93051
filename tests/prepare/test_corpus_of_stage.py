"""A corpus whose documents a stage cannot learn from is refused before anything is built, in words that lead on."""

import pytest

from dist_lm.errors import ConfigError
from tests.conftest import composed, tiny
from tests.prepare.planned import plan_of

TEXT = "{reader: files, path: a.txt, language: english}"
CHAT = "{reader: messages, path: a.jsonl, language: chat}"
RANKING = "{reader: rankings, dataset: a.jsonl, language: people}"
TEXTS_ALONE = f"corpus.corpora={{language: [{TEXT}], code: [{TEXT}]}}"
CHATS_ALONE = f"corpus.corpora={{tools: [{CHAT}]}}"
RANKINGS_ALONE = f"corpus.corpora={{pairs: [{RANKING}]}}"


@pytest.mark.parametrize(
    ("stage", "corpora", "words"),
    [
        ("tools", TEXTS_ALONE, "stage tools needs conversations; corpus=local has only texts: add a source with "),
        ("reward", TEXTS_ALONE, "stage reward needs rankings; corpus=local has only texts: add a source with reader "),
        ("preference", CHATS_ALONE, "stage preference needs rankings; corpus=local has only conversations: add a "),
        ("preference", RANKINGS_ALONE, "needs rankings; corpus=local has no corpus rankings, but has them in pairs: "),
        ("code", CHATS_ALONE, "needs texts or conversations; corpus=local has no corpus code, but has them in tools: "),
        ("code", RANKINGS_ALONE, "needs texts or conversations; corpus=local has only rankings: add a source with "),
        ("rlhf", TEXTS_ALONE, "stage rlhf needs conversations or rankings; corpus=local has only texts: add a source"),
        ("tools", "corpus.corpora={}", "stage tools needs conversations; corpus=local has no corpus: add a source"),
    ],
)
def test_a_corpus_that_the_stage_file_names_and_the_corpus_file_lacks_is_told_by_what_it_holds(stage, corpora, words):
    """The user never gave stage.corpus: a list of names alone led him to a corpus of the wrong kind."""
    with pytest.raises(ConfigError) as refused:
        composed([f"stage={stage}", *tiny(stage), corpora])
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("stage", "more", "words"),
    [
        (
            "tools",
            ["stage.mix=null"],
            "stage.corpus=code: stage tools needs conversations; corpus=local has them in tools: give ",
        ),
        ("reward", [], "stage.corpus=code: stage reward needs rankings; corpus=local has them in rankings: give "),
        ("preference", [], "stage.corpus=code: stage preference needs rankings; corpus=local has them in rankings: "),
    ],
)
def test_a_corpus_of_another_form_is_refused_in_the_plan(work, stage, more, words):
    """It was accepted, and failed on a rank after minutes: `token 1: expected <|im_start|>, found text`."""
    with pytest.raises(ConfigError) as refused:
        plan_of(work, "stage.corpus=code", "stage.init_from=none", *more, target=stage)
    assert str(refused.value).startswith(words)


@pytest.mark.heavy
def test_the_way_out_of_a_corpus_of_another_form_names_a_reader(work):
    given = (TEXTS_ALONE, "stage.corpus=code", "stage.mix=null", "stage.init_from=none")
    with pytest.raises(ConfigError, match=r"has only texts: add a source with reader messages$"):
        plan_of(work, *given, target="tools")


def test_prompts_from_a_file_need_no_corpus():
    given = ("rlhf.prompts_from=prompts.txt", "rlhf.max_new_tokens=8", "rlhf.pool.cache_tokens=0")
    composed(["stage=rlhf", *tiny("rlhf"), TEXTS_ALONE, *given])


def test_nothing_to_mix_in_says_how_to_mix_in_nothing():
    with pytest.raises(ConfigError, match=r"there is no corpus code; .*stage\.corpus=tools: none, so give stage\.mix="):
        composed(["stage=tools", *tiny("tools"), CHATS_ALONE])
    beside = f"corpus.corpora={{tools: [{CHAT}], language: [{TEXT}]}}"
    with pytest.raises(ConfigError, match=r"stage\.corpus=tools: language \(stage\.mix\.code=0 leaves it out\)$"):
        composed(["stage=tools", *tiny("tools"), beside])
