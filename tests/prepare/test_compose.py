"""The command line: what is refused, in which words, and what earlier stages take from it."""

import dataclasses

import pytest

from dist_lm.config.root import Config, save_config
from dist_lm.errors import ConfigError
from dist_lm.prepare.command_file import command_file
from dist_lm.prepare.compose import choices, compose_config, overrides_of, target_stage
from dist_lm.rlhf.config import RewardPartConfig
from dist_lm.stages.registry import load_config
from dist_lm.stages.rlhf.config import RlhfRunConfig


@pytest.mark.parametrize(
    ("model", "stage"),
    [  # files of both, as recipes, are composed in test_recipes.py
        pytest.param(model, stage, marks=() if model == "nano" or stage == "rlhf" else pytest.mark.bars)
        for model in choices("model")
        for stage in choices("stage")
    ],
)
def test_every_model_composes_with_every_stage(model, stage):
    config = compose_config([f"stage={stage}", f"model={model}"])
    assert (config.model.name, config.stage.name) == (model, stage)
    assert config.tokenizer.vocab_size == config.model.vocab_size


@pytest.mark.heavy
@pytest.mark.parametrize("group", ["parallel", "corpus", "tracking", "experiment"])
def test_every_choice_of_a_group_composes(group):
    for choice in choices(group):
        # Experiments that hold a command are composed in test_shipped_experiments.py.
        if group != "experiment" or not command_file(choice):
            compose_config([f"{group}={choice}"])


def test_an_experiment_that_holds_a_command_is_named_where_a_group_is_composed():
    with pytest.raises(ConfigError, match=r"^experiment=qwen3_8b: this file holds a whole command, which `python -m"):
        compose_config(["stage=code", "experiment=qwen3_8b"])


def test_large_has_exactly_the_listed_numbers():
    model = compose_config(["model=large"]).model
    assert (model.d_model, model.n_layers, model.n_heads, model.d_ff) == (1600, 32, 25, 6400)
    assert (model.max_seq_len, model.vocab_size, model.d_head) == (4096, 32000, 64)


@pytest.mark.parametrize(("stage", "lr"), [("language", 1e-4), ("code", 1e-5), ("tools", 3e-6)])
def test_the_large_stages_have_the_listed_peak_rates(stage, lr):
    config = compose_config(["model=large", f"stage={stage}"]).stage
    assert config.lr == lr
    assert (config.weight_decay, config.beta1, config.beta2) == (0.1, 0.9, 0.95)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("stage.stepz=3", ["stage.stepz=3", "did you mean stage.steps?"]),
        ("stepz=3", ["stepz=3", "no such key"]),
        ("stage.steps=abc", ["stage.steps=abc", "an integer"]),
        ("stage.dropout=x", ["stage.dropout=x", "a number"]),
        ("stage.dropout=1.5", ["stage.dropout=1.5", "[0, 1)"]),
        ("dry_run=perhaps", ["dry_run=perhaps", "true or false"]),
        ("model=huge", ["model=huge", "nano", "large"]),
        ("model.n_heads=7", ["model.n_heads=7", "model.d_model=160", "8"]),
        ("model.n_kv_heads=3", ["model.n_kv_heads=3", "model.n_heads=5"]),
        ("stage.seq_len=100000", ["stage.seq_len=100000", "model.max_seq_len=1024"]),
        ("cluster=ray", ["cluster.address", "host:port"]),
        ("stage.corpus=novels", ["stage.corpus=novels", "language, code"]),
        ("stage.mix.novels=0.1", ["stage.mix", "novels"]),
        (
            "stage.mix={novels:0.1}",
            ["stage.mix={novels: 0.1}", "no corpus novels", "stage.corpus=code: language"],
        ),
        ("stage.mix=3", ["stage.mix=3", "expected {NAME: a number}"]),
        ("stage.mix={code: 0.1}", ["stage.mix=code", "stage.corpus=code: language, tools"]),
        ("stage.mix={language: -0.1}", ["stage.mix.language=-0.1", "in whole per cent", "0: none of it"]),
        ("stage.mix={language: 0.125}", ["stage.mix.language=0.125", "whole per cent"]),
        ("stage.mix={language: 0.6, tools: 0.4}", ["stage.mix=1 in all", "below 1"]),
        ("stage.lr=inf", ["stage.lr", "a positive number"]),
        ("stage.muon.lr=inf", ["stage.muon.lr"]),
        ("stage.mix={language: a lot}", ["stage.mix.language", "a lot"]),
        ("stage.corpora=[novels]", ["stage.corpora=[novels]", "no such key"]),
        ("+new=1", ["+new=1", "cannot be added"]),
        ("~seed", ["~seed", "cannot be added or removed"]),
        ("stage.steps=1,2", ["stage.steps=1,2", "single value"]),
        ("foo", ["foo", "key=value"]),
        ("run_id=", ["run_id=''", "plain name"]),
        ("run_id=../x", ["run_id=../x", "plain name"]),
        ("run_id='a\nb'", ["run_id='a\\nb'", "plain name"]),
        ("corpus.corpora={code: [{reader: jsonl, limit: ten}]}", ["corpus.corpora.code[0].limit=ten", "an integer"]),
        ("stage.name=../../evil", ["stage.name=../../evil", "expected code"]),
        (
            "corpus.corpora={code: [{reader: jsonl, path: a, language: x, held_out: true}]}",
            ["corpus.corpora.code: held_out=true", "a source without held_out beside it"],
        ),
        ("tokenizer=3", ["tokenizer=3", "train, keep, or the path"]),
        ("tokenizer.vocab_size=70000", ["tokenizer.vocab_size=70000", "model.vocab_size=4096"]),
        ("prerequisites=maybe", ["prerequisites=maybe", "build or fail"]),
    ],
)
def test_bad_input_is_one_line_that_names_key_value_and_way_out(override, words):
    with pytest.raises(ConfigError) as refused:
        compose_config([override])
    message = str(refused.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_a_corpus_that_is_none_is_not_built():
    with pytest.raises(ConfigError, match=r"^stage\.corpora=novels: expected some of language, code, tools"):
        compose_config(["stage=shards", "stage.corpora=[novels]"])


PART = ", ".join(one.name for one in dataclasses.fields(RewardPartConfig))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rlhf.rewards.x=3", f"rlhf.rewards.x=3: expected rlhf.rewards.x.KEY=value with KEY one of {PART}"),
        ("rlhf.rewards.x.weight=abc", "rlhf.rewards.x.weight=abc: expected a number"),
        (
            "rlhf.rewards.x.kind=nope",
            "rlhf.rewards.x.kind=nope: expected reward_model, length, parses, function, tests, environment",
        ),
        (
            "rlhf.rewards.x.weight=1",
            "rlhf.rewards.x.kind=: expected reward_model, length, parses, function, tests, environment",
        ),
        (
            "rlhf.rewards.x.wait=1",
            f"rlhf.rewards.x.wait=1: no such key; did you mean rlhf.rewards.x.weight? keys of rlhf.rewards.x: {PART}",
        ),
        ("rlhf.rewards.x={kind: length, target: a}", "rlhf.rewards.x.target=a: expected an integer"),
        ("rlhf.rewards={x: {kind: length, target: a}}", "rlhf.rewards.x.target=a: expected an integer"),
        (
            "rlhf.rewards={x: {kind: length, targt: 3}}",
            f"rlhf.rewards.x.targt: no such key; did you mean rlhf.rewards.x.target? keys of rlhf.rewards.x: {PART}",
        ),
        ("rlhf.rewards={x: 3}", f"rlhf.rewards.x=3: expected {{{PART.replace(',', ': ...,')}: ...}}"),
        ("rlhf.rewards=3", f"rlhf.rewards=3: expected {{NAME: {{{PART.replace(',', ': ...,')}: ...}}}}"),
    ],
)
def test_a_wrong_part_of_the_reward_is_named_by_its_full_key(override, message):
    with pytest.raises(ConfigError) as refused:
        compose_config(["stage=rlhf", override])
    assert str(refused.value) == message


@pytest.mark.heavy
def test_a_part_of_the_reward_can_be_given_key_by_key():
    together = compose_config(["stage=rlhf", "rlhf.rewards={size: {kind: length, target: 9}}"])
    one_by_one = compose_config(["stage=rlhf", "rlhf.rewards.size.kind=length", "rlhf.rewards.size.target=9"])
    assert one_by_one == together
    mine = "dist_lm.errors:require"
    given = compose_config(["stage=rlhf", "rlhf.rewards.mine.kind=function", f"rlhf.rewards.mine.function={mine}"])
    assert isinstance(given, RlhfRunConfig)
    assert given.rlhf.rewards["mine"].function == mine
    assert "preference" in given.rlhf.rewards


def test_a_command_without_a_stage_lists_the_stages():
    with pytest.raises(ConfigError, match=r"stage is not given.*code.*language"):
        target_stage(["model=nano"])
    with pytest.raises(ConfigError, match=r"stage=cod: did you mean stage=code\? expected one of code,"):
        target_stage(["stage=cod"])


def test_keys_of_the_stage_asked_for_do_not_reach_earlier_stages():
    command = ["stage=code", "model=tiny", "stage.steps=7", "stages.language.steps=3", "seed=4"]
    assert overrides_of("code", "code", command) == ["stage=code", "model=tiny", "stage.steps=7", "seed=4"]
    assert overrides_of("language", "code", command) == [
        "stage=language",
        "model=tiny",
        "stage.steps=3",
        "seed=4",
    ]


@pytest.mark.heavy
def test_a_saved_configuration_reads_back_equal(tmp_path):
    config = compose_config(["stage=code", "model=nano", "model.n_kv_heads=1"])
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert isinstance(config, Config)
    assert dataclasses.asdict(config)["stage"]["sampling"]["prompts"]
