"""Two models are compared on the same questions, and the difference of a comparison is that of the table."""

import pytest

from dist_lm.config.corpus import TokenizerConfig
from dist_lm.config.evaluation import FIXED_TESTS, OWN_TESTS
from dist_lm.errors import ArtefactError
from dist_lm.evaluation.comparison import compared_tasks, comparison_text
from dist_lm.evaluation.figures import bits_figures
from dist_lm.evaluation.tasks import Asking, hidden_seed_of, tool_items
from dist_lm.stages.evaluate.inputs import version_of_tests
from dist_lm.storage import durable
from dist_lm.storage.run_directory import WorkDirectory
from dist_lm.tokenizer.tokenizer import Tokenizer
from dist_lm.tokenizer.train import train_tokenizer
from tests.conftest import texts
from tests.training_run import linked


def asking_of(tokenizer: Tokenizer, context: int = 256) -> Asking:
    return Asking.greedy(tokenizer, context, True, 9)


@pytest.mark.heavy
def test_a_question_about_tools_has_one_id_whatever_fits_the_context(tiny_work):
    tokenizer, folder = Tokenizer.load(tiny_work.tokenizer_model), tiny_work.corpus("tools")
    wide = {item.id: item.prompt for item in tool_items(asking_of(tokenizer), folder)}
    narrower = (tool_items(asking_of(tokenizer, context), folder) for context in range(255, 0, -5))
    narrow = {item.id: item.prompt for item in next(some for some in narrower if len(some) < len(wide))}
    assert len(wide) > len(narrow) > 0
    assert all(wide[name] == prompt for name, prompt in narrow.items())


def test_a_model_with_another_tokenizer_is_asked_the_same_about_tools(tiny_work, tmp_path):
    own, folder = Tokenizer.load(tiny_work.tokenizer_model), tiny_work.corpus("tools")
    train_tokenizer(
        [one.text for one in texts("english", 80)], tmp_path / "other.model", TokenizerConfig(vocab_size=512)
    )
    other = Tokenizer.load(tmp_path / "other.model")
    asked, others = tool_items(asking_of(own, 999), folder), tool_items(asking_of(other, 999), folder)
    assert [item.id for item in others] == [item.id for item in asked]
    assert [other.decode(item.prompt) for item in others] == [own.decode(item.prompt) for item in asked]
    work = linked(tiny_work, tmp_path / "work")
    (work.path / "tokenizer").unlink()
    work.tokenizer.mkdir()
    (tmp_path / "other.model").rename(work.tokenizer_model)
    with pytest.raises(ArtefactError, match=r"tools was written with tokenizer .*: restore that tokenizer"):
        tool_items(asking_of(other), work.corpus("tools"))


def result(model: str, values: dict[str, float]) -> dict:
    task = {"figures": {}, "groups": {}, "outcomes": {}, "ids": [*values], "values": [*values.values()]}
    return {"model": model, "tasks": {"tools": task}}


def test_models_with_other_questions_are_compared_on_those_in_common():
    first = result("a", {"1": 1.0, "2": 0.0, "3": 0.0})
    (one,) = compared_tasks(first, result("b", {"3": 1.0, "4": 1.0, "1": 1.0}))
    assert (one["difference"], one["left_out"]) == (0.5, 2)
    assert comparison_text(one).endswith("(McNemar); without 2 questions that only one of them has")
    (none,) = compared_tasks(first, result("c", {"9": 1.0}))
    assert comparison_text(none) == "tools: c - a: not compared, they have no question in common"


@pytest.mark.parametrize("tests", [None, {"version": 2, "seed": 1}, {"version": 3, "seed": 0}])
def test_figures_of_other_tests_are_not_compared(tests):
    """Found: an interval of the difference of two models, of which one had easier tests."""
    first, second = result("a", {"1": 1.0, "2": 0.0}), result("b", {"1": 1.0, "2": 1.0})
    first["tasks"]["tools"]["tests"] = {"version": 2, "seed": 0}
    (same,) = compared_tasks(first, {"model": "c", "tasks": first["tasks"]})
    assert same["difference"] == 0
    if tests:
        second["tasks"]["tools"]["tests"] = tests
    (other,) = compared_tasks(first, second)
    assert "difference" not in other
    named = "version 1" if tests is None else f"version {tests['version']}, seed {tests['seed']}"
    text = f"tools: b - a: not compared, their tests differ (version 2, seed 0 and {named})"
    assert comparison_text(other) == text


def test_an_evaluation_goes_on_with_the_tests_that_it_began_with(tmp_path):
    run = WorkDirectory(tmp_path).run("evaluate", "default")
    run.create()
    assert version_of_tests(run) == OWN_TESTS
    for recorded, version in (
        ({"stage.models=x": "0"}, FIXED_TESTS),
        ({"eval.tests": "2"}, 2),
        ({"eval.tests": "3"}, 3),
    ):
        durable.write_json(run.inputs, recorded)
        assert version_of_tests(run) == version
    assert hidden_seed_of(FIXED_TESTS, 5, run.path) is None
    assert hidden_seed_of(OWN_TESTS, 5, run.path) == 5
    with pytest.raises(ArtefactError, match="began with version 3 of the tests of our own problems"):
        hidden_seed_of(3, 5, run.path)


def test_the_difference_of_bits_per_byte_is_that_of_the_table():
    documents = [{"id": "x", "group": "s", "bits": 8.0, "bytes": 4}, {"id": "y", "group": "t", "bits": 1.0, "bytes": 1}]
    models = []
    for name, bits in (("a", (8.0, 1.0)), ("b", (4.0, 3.0))):
        found = bits_figures([one | {"bits": own} for one, own in zip(documents, bits, strict=True)])
        models.append({"model": name, "tasks": {"bits_per_byte": found}})
    first, second = (one["tasks"]["bits_per_byte"]["figures"]["bits_per_byte"]["value"] for one in models)
    assert compared_tasks(*models)[0]["difference"] == pytest.approx(second - first)
    assert second - first == pytest.approx(-2 / 5)
