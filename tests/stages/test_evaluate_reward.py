"""Task `reward`: every answer is scored after its whole prompt, or counted as an outcome."""

import json

import pytest

from dist_lm.errors import ConfigError
from dist_lm.evaluation.comparison import compared_tasks, figures_of
from dist_lm.evaluation.figures import recorded, reward_figures
from dist_lm.evaluation.tasks import Asking, prompt_items
from dist_lm.generation.request import Answer
from dist_lm.stages.evaluate.reward import prompts_of, reward_scores
from dist_lm.tokenizer.tokenizer import Tokenizer
from tests.conftest import TINY_MODEL, composed
from tests.training_run import linked, write_untrained

LONG = "def f(x): return x\n" * 600


def test_answers_that_no_score_belongs_to_are_counted(tiny_work, tmp_path):
    work = linked(tiny_work, tmp_path / "work")
    model = write_untrained(work, "reward", 0).path
    config = composed(["stage=evaluate", *TINY_MODEL, f"work_dir={work.path}"])
    records = [{"id": "0", "error": "300 tokens"}, *({"id": str(n), "text": "yes"} for n in (1, 2))]
    records += [{"id": "3", "text": ""}, {"id": "4", "text": LONG}]
    texts = {"0": LONG, "1": "def f", "2": "def g", "3": "def f", "4": "def f"}
    found = reward_scores(model, config, records, texts, lambda: True)
    assert found is not None
    assert [one["outcome"] for one in found] == ["refused", "scored", "scored", "scored", "too long"]
    figures = reward_figures(found)
    assert figures["outcomes"] == {"refused": 1, "scored": 3, "too long": 1}
    assert figures["ids"] == ["1", "2", "3"]
    assert len({*figures["values"]}) == 3  # the prompt counts, and so does the end of an empty answer
    none = reward_figures(found[:1])
    assert none["figures"] == {}
    model_of = {"model": "a", "tasks": {"reward": none}}
    assert figures_of({"models": [model_of]}) == "1 model, 1 task"
    assert compared_tasks(model_of, {"model": "b", "tasks": {"reward": figures}})[0]["left_out"] == 3


def test_the_whole_answer_is_kept_for_its_score(tiny_work, tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("def f\n")
    (item,) = prompt_items(
        prompts_of(str(path)), Asking.greedy(Tokenizer.load(tiny_work.tokenizer_model), 99, False, 9)
    )
    answer = Answer("0", 0, 1, (1,), LONG, (0.0,), (0.0,), "stop", 0, 0)
    assert recorded(item, answer, item.judge(answer, None))()["text"] == LONG


@pytest.mark.parametrize(
    ("lines", "named"),
    [
        (
            [{"prompt": "a", "id": 0}, {"prompt": "b", "id": 0}],
            r"id 0 occurs twice, p\.jsonl line 1 and p\.jsonl line 2",
        ),
        ([{"prompt": "a"}, {"prompt": "b", "suffix": "c"}], r"p\.jsonl line 2: has a suffix"),
        ([{"prompt": "a"}, {"prompt": ""}], r"p\.jsonl line 2: the prompt is empty"),
        ([{"prompt": "a"}, {"text": "b"}], r"p\.jsonl line 2: expected an object"),
        ([], "no prompts in"),
    ],
)
def test_prompts_that_cannot_be_scored_are_refused_by_their_line(lines, named, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ConfigError, match=rf"^eval\.prompts.*{named}"):
        prompts_of(str(path))
