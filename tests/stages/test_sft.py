"""Stage sft: what it needs, where it starts, which answers it asks for, and the stages behind it."""

import json

import pytest

from dist_lm.config.stage import LoraConfig
from dist_lm.data.token_corpus import TokenCorpus
from dist_lm.errors import ConfigError
from dist_lm.prepare.compose import compose_config
from dist_lm.prepare.plan import check_stage_prefixes
from dist_lm.stages.sft import held_out_answers
from dist_lm.stages.stage import Action
from dist_lm.stages.training.program import trained_tokens
from dist_lm.tokenizer.tokenizer import Tokenizer
from dist_lm.training import checkpoint_files as files
from dist_lm.training.checkpoint_tensors import model_weights
from tests.conftest import TINY
from tests.prepare.planned import actions, make_run, plan_of
from tests.training_run import linked, numbers, prepare, train, write_untrained

SHORT = ("stage.steps=4", "stage.seq_len=64", "stage.eval_at_start=true", "stage.answers.max_new_tokens=8")

RULES_ONLY = (
    "stage.corpus=tools",
    "rlhf.rewards.preference.weight=0",
    "rlhf.rewards={size: {kind: length, target: 9}}",
)


@pytest.fixture
def work(tiny_work, tmp_path):
    return linked(tiny_work, tmp_path / "work")


@pytest.mark.heavy
def test_it_needs_conversations_and_a_start_alone(work):
    """Finds a stage that builds language or code on the way, or silently trains random weights."""
    with pytest.raises(ConfigError, match=r"^stage\.init_from=auto: stage sft follows no other stage: expected hf:"):
        plan_of(work, target="sft")
    start = make_run(work, "language", done=True)
    plan = plan_of(work, f"stage.init_from={start.path}", target="sft")
    assert actions(plan) == {"tokenizer": Action.READY, "shards": Action.READY, "sft": Action.BUILD}
    assert "3.0 epochs of tools" in plan.target.detail
    alone = "corpus.corpora={tools: [{reader: messages, path: [/d], language: x, licence: y}]}"
    assert compose_config(["stage=sft", *TINY, alone]).corpus_names == ("tools",)
    with pytest.raises(ConfigError, match=r"stage\.corpus=code: stage sft needs conversations"):
        plan_of(work, f"stage.init_from={start.path}", "stage.corpus=code", target="sft")


@pytest.mark.heavy
def test_steps_of_the_command_replace_the_epochs_of_the_file():
    assert compose_config(["stage=sft", *TINY, "stage.steps=7"]).stage.steps == 7
    with pytest.raises(ConfigError, match=r"not together with stage\.epochs=2"):
        compose_config(["stage=sft", *TINY, "stage.steps=7", "stage.epochs=2"])


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("target", "more", "between"),
    [
        ("preference", (), ["sft", "rankings"]),
        ("reward", ("stage.reward.normaliser_new_tokens=8",), ["sft", "rankings"]),
        ("rlhf", RULES_ONLY, ["sft"]),
    ],
)
def test_later_stages_begin_behind_it_by_a_key(target, more, between, work):
    """Finds a plan that builds stage tools on the way, or leaves out stage sft."""
    start = make_run(work, "language", done=True)
    keys = ("stage.init_from=stage:sft", f"stages.sft.init_from={start.path}", "stages.sft.seq_len=64", *more)
    check_stage_prefixes(keys, target)
    plan = plan_of(work, *keys, target=target)
    assert [stage.name for stage in plan.stages][2:] == [*between, target]
    assert plan.target.config.stage.init_from == str(work.run("sft", "default").path)


def test_a_start_by_the_name_of_a_later_stage_is_refused(work):
    with pytest.raises(ConfigError, match=r"stage:rlhf: expected stage:NAME .* before sft: language, code$"):
        plan_of(work, "stage.init_from=stage:rlhf", target="sft")


def test_answers_are_the_last_learned_spans(tiny_work):
    """Finds a prompt that holds a part of the answer, and an answer that goes on after its end."""
    corpus = TokenCorpus.open(tiny_work.corpus("tools"), "val")
    answers = held_out_answers(corpus, 5, longest_prompt=200)
    assert len(answers) == 5
    for answer in answers:
        whole = answer.prompt + answer.expected
        document = next(n for n in range(corpus.n_documents) if corpus.tokens(n, 0, len(whole)).tolist() == whole)
        mask = corpus.mask(document, 0, int(corpus.lengths[document]))
        assert mask[len(answer.prompt) : len(whole)].all()
        assert not mask[len(answer.prompt) - 1]
        assert not mask[len(whole) :].any()
    shortest = min(len(answer.prompt) for answer in held_out_answers(corpus, corpus.n_documents, 10**6))
    assert held_out_answers(corpus, 5, shortest - 1) == []


@pytest.mark.heavy
def test_it_learns_writes_answers_and_is_the_start_of_a_preference_run(work):
    start = write_untrained(work, "language", seed=0)
    run = prepare(work, "default", *SHORT, f"stage.init_from={start.path}", "stage.mix={language: 0.25}", stage="sft")
    result = train(run, ranks=1)
    assert result["metrics"]["val/loss"] < result["before"]["val/loss"]
    assert any("language" in name for name in numbers(run)[4])  # the mixed corpus has figures of its own
    lines = [json.loads(line) for line in (run.samples / "step_00000004.jsonl").read_text().splitlines()]
    assert 0 < len(lines) <= 8
    assert {"prompt", "expected", "found", "finish"} == set(lines[0])
    assert len(list(run.samples.glob("step_*.jsonl"))) == 2
    plan = plan_of(work, f"stage.init_from={run.path}", target="preference")
    assert [stage.name for stage in plan.stages][-2:] == ["rankings", "preference"]


@pytest.mark.heavy
def test_rows_of_new_tokens_are_trained_beside_adapters_and_merged(work):
    """Finds rows that a resumed or later run takes from the base, and rows of other tokens that change."""
    start = write_untrained(work, "language", seed=0)
    tokens = "stage.lora.tokens=['<|im_start|>','<|im_end|>']"
    lora = ("stage.lora.rank=2", "stage.lora.rslora=true", "stage.lora.dropout=0.1", tokens)
    run = prepare(work, "lora", *SHORT, *lora, f"stage.init_from={start.path}", stage="sft")
    train(run, ranks=1)
    marks = Tokenizer.load(work.tokenizer_model).special_ids
    before, after = (model_weights(files.find_checkpoint(path)) for path in (start.path, run.path))
    for name in ("embedding.weight", "lm_head.weight"):
        changed = (before[name] != after[name]).any(1).nonzero()[0].tolist()
        assert changed == sorted((marks["<|im_start|>"], marks["<|im_end|>"]))

    # A later run starts from the merged weights, and does not move them with a rate near 0.
    still = (
        "stage.lr=1e-30",
        "stage.muon.lr=0",
        "stage.steps=1",
        "stage.answers.conversations=0",
        "stage.weight_decay=0",
    )
    later = prepare(work, "later", *SHORT, *still, f"stage.init_from={run.path}", stage="sft")
    train(later, ranks=1)
    for name, value in model_weights(files.find_checkpoint(later.path)).items():
        assert abs(value - after[name]).max() < 1e-6, name


@pytest.mark.parametrize(
    ("stage", "keys", "message"),
    [
        ("sft", ("stage.lora.dropout=0.1",), r"stage\.lora\.dropout=0\.1: expected 0 without stage\.lora\.rank"),
        (
            "rlhf",
            ("stage.lora.rank=2", "stage.lora.dropout=0.1"),
            r"stage\.lora\.dropout=0\.1: expected 0 in stage rlhf",
        ),
        ("rlhf", ("stage.lora.rank=2", "stage.lora.tokens=[a]"), r"stage\.lora\.tokens=.* none in stage rlhf"),
    ],
)
def test_settings_of_adapters_that_a_stage_cannot_have_are_refused(stage, keys, message):
    with pytest.raises(ConfigError, match=message):
        compose_config([f"stage={stage}", *keys])


def test_a_token_that_the_tokenizer_lacks_is_refused(work):
    tokenizer = Tokenizer.load(work.tokenizer_model)
    with pytest.raises(ConfigError, match=r"stage\.lora\.tokens=<eos>: expected special tokens of .*, such as <"):
        trained_tokens(LoraConfig(rank=1, tokens=["<eos>"]), tokenizer)
