"""`dist-lm recipe new` writes an experiment whose command runs, from the sizes of model, data and machine."""

import importlib.util
import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from dist_lm.__main__ import recipe_new
from dist_lm.config.root import save_config
from dist_lm.data.new import Survey
from dist_lm.errors import ConfigError, UserError
from dist_lm.prepare.compose import compose_config
from dist_lm.prepare.plan import plan_command, with_command_file
from dist_lm.stages.stage import Action
from dist_lm.tracking.readable import counted
from dist_lm.verbs import recipe
from dist_lm.verbs.recipe import batch_of, sequence_length
from tests.conftest import TINY, VOCAB_SIZE
from tests.interop.hf_models import our_model, small
from tests.stages.test_export import saved
from tests.training_run import linked, write_untrained


@pytest.fixture
def model(tiny_work, tmp_path) -> Path:
    """A Llama of transformers, with a context of 512 tokens."""
    config = small("Llama", d_model=40, d_ff=80, max_seq_len=512, vocab_size=VOCAB_SIZE)
    return saved(tmp_path / "Llama-chat", our_model(config), tiny_work)


@pytest.fixture
def chats(tmp_path) -> Path:
    path = tmp_path / "chats.jsonl"
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"What is {n} and {n}?"},
                {"role": "assistant", "content": f"{2 * n}"},
            ]
        }
        for n in range(120)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def written(out: Path) -> dict[str, Any]:
    return yaml.safe_load(out.read_text())


def plan_of(out: Path, *more: str, work: Path) -> Any:
    return plan_command([f"hydra.searchpath=['{out.parents[1]}']", f"experiment={out.stem}", f"work_dir={work}", *more])


@pytest.mark.heavy
def test_the_experiment_names_model_data_and_numbers_and_its_command_is_planned(model, chats, tmp_path, capsys):
    """Finds a file whose first command is refused, and a corpus file with a command that would not fine-tune."""
    out, corpus_file = tmp_path / "lab" / "experiment" / "ours.yaml", tmp_path / "lab" / "corpus" / "ours.yaml"
    recipe_new(f"hf:{model}", [str(chats)], out)
    assert f"written: {corpus_file}, {out}" in capsys.readouterr().out
    corpus_text = corpus_file.read_text()
    assert "# Written by: dist-lm recipe new hf:" in corpus_text
    assert f"python -m dist_lm.launch --config-dir {tmp_path / 'lab'} experiment=ours" in corpus_text
    assert "stage=tools" not in corpus_text

    sft = written(out)["stages"]["sft"]
    assert (sft["epochs"], sft["seq_len"], sft["global_batch"], sft["lr"]) == (3, 256, 4, 1e-4)
    plan = plan_of(out, work=tmp_path / "work")
    assert [stage.name for stage in plan.stages] == ["import", "tokenizer", "shards", "sft"]
    assert plan.target.config.run_id == "ours"
    assert plan.target.config.stage.corpus == "tools"
    assert plan.target.config.model.max_seq_len == 512
    with pytest.raises(ConfigError, match="there is such a file"):
        recipe_new(f"hf:{model}", [str(chats)], out)

    # Words of the command line come last; steps replace epochs; a later stage takes the keys that are its own.
    stage = plan_of(out, "stage.steps=7", "stage.lr=3e-6", work=tmp_path / "work").target.config.stage
    assert (stage.steps, stage.epochs, stage.lr) == (7, 0, 3e-6)
    exported = plan_of(out, "stage=export", "stage.run=sft", "stages.sft.steps=7", work=tmp_path / "work")
    assert (exported.stages[-2].config.stage.steps, exported.stages[-2].config.stage.epochs) == (7, 0)
    assert [stage.name for stage in exported.stages][-2:] == ["sft", "export"]


@pytest.mark.parametrize("n_pairs", [1, 60, 1_000, 100_000])
def test_most_steps_on_preferences_are_behind_the_warm_up(n_pairs):
    """Fault: 60 pairs gave two steps, first with a warm-up of ten, then, because steps were counted in pairs and not in
    packed sequences, with one of two: nothing was learned."""
    model = replace(compose_config(["stage=code", *TINY]).model, max_seq_len=4096)
    start = recipe.Start("hf:none", model, {})
    pairs = Survey(documents=Counter(preferences=n_pairs), bytes=Counter(preferences=280 * n_pairs))
    keys, line = recipe.preference_keys(start, {"seq_len": 256}, pairs)
    n_sequences = min(n_pairs, math.ceil(n_pairs * 280 / 4 / keys["seq_len"]))
    steps = math.ceil(n_sequences * keys["epochs"] / keys["global_batch"])
    assert keys["seq_len"] == 512
    assert keys["warmup_steps"] <= max(1, 0.2 * steps)
    assert keys["global_batch"] <= 32
    assert keys["epochs"] == (3 if n_pairs < 1_000 else keys["epochs"])
    assert f"about {counted(steps, 'step')} in" in line


@pytest.mark.heavy
def test_preferences_and_prompts_come_behind_it(model, chats, tmp_path, monkeypatch):
    pairs, prompts = tmp_path / "pairs.jsonl", tmp_path / "prompts.jsonl"
    row = {"chosen": "Yes, this is so.", "rejected": "No."}
    pairs.write_text("".join(json.dumps({"prompt": f"Is {n} a number?", **row}) + "\n" for n in range(100)))
    prompts.write_text("".join(json.dumps({"prompt": f"Say {n}."}) + "\n" for n in range(40)))
    out = tmp_path / "lab" / "experiment" / "pairs.yaml"
    recipe_new(f"hf:{model}", [str(chats)], out, preferences=[str(pairs)])
    plan = plan_of(out, work=tmp_path / "work")
    assert [stage.name for stage in plan.stages][-3:] == ["sft", "rankings", "preference"]
    assert plan.target.config.stage.init_from == str((tmp_path / "work" / "runs" / "sft" / "pairs").resolve())
    assert written(out)["stages"]["preference"]["global_batch"] == 4
    first = plan_of(out, "stage=sft", work=tmp_path / "work")
    assert [stage.name for stage in first.stages] == ["import", "tokenizer", "shards", "sft"]

    out = tmp_path / "lab" / "experiment" / "answers.yaml"
    (tmp_path / "my_rewards.py").write_text("def score(prompt: str, completion: str) -> float:\n    return 1.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    recipe_new(f"hf:{model}", [str(chats)], out, prompts=prompts, reward="my_rewards:score")
    plan = plan_of(out, work=tmp_path / "work")
    assert [stage.name for stage in plan.stages][-2:] == ["sft", "rlhf"]
    with pytest.raises(ConfigError, match=r"--reward=''"):
        recipe_new(f"hf:{model}", [str(chats)], out, prompts=prompts, force=True)


@pytest.mark.heavy
def test_a_run_may_be_the_model(tiny_work, chats, tmp_path):
    work = linked(tiny_work, tmp_path / "work")
    run = write_untrained(work, "code", seed=0)
    save_config(compose_config(["stage=code", *TINY, f"work_dir={work.path}"]), run.config)
    out = tmp_path / "lab" / "experiment" / "own.yaml"
    recipe_new(str(run.path), [str(chats)], out)
    plan = plan_of(out, work=tmp_path / "other")
    assert [stage.name for stage in plan.stages] == ["tokenizer", "shards", "sft"]
    assert plan.stages[-1].action is Action.BUILD


@pytest.mark.bars
def test_adapters_are_trained_where_the_whole_model_does_not_fit(model, chats, tmp_path, monkeypatch):
    out = tmp_path / "lab" / "experiment" / "small.yaml"
    monkeypatch.setattr(recipe, "fits", lambda folder, name, start, keys: "lora" in keys)
    recipe_new(f"hf:{model}", [str(chats)], out)
    sft = written(out)["stages"]["sft"]
    assert (sft["lora"], sft["lr"]) == ({"rank": 16, "alpha": 32, "dropout": 0.05}, 1e-3)
    monkeypatch.setattr(recipe, "fits", lambda folder, name, start, keys: "load_in_4bit" in keys.get("lora", {}))
    if importlib.util.find_spec("bitsandbytes"):
        out = tmp_path / "lab" / "experiment" / "four_bits.yaml"
        recipe_new(f"hf:{model}", [str(chats)], out)
        assert written(out)["stages"]["sft"]["lora"] == sft["lora"] | {"load_in_4bit": True}
    monkeypatch.setattr(recipe, "fits", lambda *_: False)
    with pytest.raises(ConfigError, match="do not fit this machine, not even in four bits"):
        recipe_new(f"hf:{model}", [str(chats)], tmp_path / "lab" / "experiment" / "none.yaml")


@pytest.mark.parametrize(
    ("out", "message"),
    [("lab/ours.yaml", "expected DIR/experiment/NAME.yaml"), ("lab/experiment/smoke.yaml", "a name of dist_lm's own")],
)
def test_files_that_no_launch_would_find_are_refused(out, message, model, chats, tmp_path):
    with pytest.raises(ConfigError, match=message):
        recipe_new(f"hf:{model}", [str(chats)], tmp_path / out)


def test_texts_are_refused_and_leave_no_file(model, tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": f"A text of some words, number {n}."}) + "\n" for n in range(100)))
    with pytest.raises(UserError, match="texts, not conversations"):
        recipe_new(f"hf:{model}", [str(path)], tmp_path / "lab" / "experiment" / "ours.yaml")
    assert not (tmp_path / "lab").exists()


def test_preferences_that_cannot_be_read_are_refused_first_and_leave_no_file(model, chats, tmp_path, capsys):
    """Fault: half a minute went by, `written:` was said, and empty folders stayed."""
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("Asked,Good,Bad\n" + "".join(f"Is {n} even?,Perhaps.,No.\n" for n in range(20)))
    with pytest.raises(UserError, match="the columns there are Asked, Good, Bad"):
        recipe_new(f"hf:{model}", [str(chats)], tmp_path / "lab" / "experiment" / "x.yaml", preferences=[str(pairs)])
    assert "written" not in capsys.readouterr().out
    assert not (tmp_path / "lab").exists()


@pytest.mark.heavy
def test_preferences_in_columns_of_any_name(model, chats, tmp_path):
    """Fault: a table of one's own had to be written again with the columns prompt, chosen and rejected."""
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("Asked,Good,Bad\n" + "".join(f"Is {n} even?,Perhaps.,No.\n" for n in range(60)))
    out = tmp_path / "lab" / "experiment" / "own.yaml"
    columns: dict[str, Any] = {"prompt_column": "Asked", "chosen_column": "Good", "rejected_column": "Bad"}
    recipe_new(f"hf:{model}", [str(chats)], out, preferences=[str(pairs)], **columns)
    plan = plan_of(out, work=tmp_path / "work")
    (source,) = plan.target.config.corpus.corpora["rankings"]
    assert {key: getattr(source, key) for key in columns} == columns
    assert "--chosen-column Good" in out.read_text()


def test_numbers_follow_from_the_data():
    assert [sequence_length(n, 4096) for n in (3, 256, 257, 3000, 20_000)] == [256, 256, 512, 4096, 4096]
    assert sequence_length(20_000, 32_768) == 8192
    assert [batch_of(n) for n in (1, 200, 300, 1_000, 10**6)] == [4, 4, 8, 16, 64]


def test_a_mistyped_experiment_is_named():
    with pytest.raises(ConfigError, match=r"experiment=smoek: expected one of .*did you mean experiment=smoke"):
        with_command_file(["experiment=smoek"])


def test_values_of_a_command_file_are_those_of_hydra(tmp_path):
    """Finds a value that the command line reads as another type."""
    file = tmp_path / "experiment" / "own.yaml"
    file.parent.mkdir()
    content = {
        "stage": "sft",
        "work_dir": "a b",
        "stages": {"sft": {"lr": 1e-5, "mix": {"code": 0.1}, "eval_tasks": {}}},
    }
    content["stages"]["sft"] |= {
        "init_from": "hf:/a/b-1.0",
        "eval_at_start": True,
        "lora": {"tokens": ["<|im_start|>"]},
        "phases": [{"until": 0.8, "mix": {"code": 3}}, {"mix": {"tools": "2 epochs", "code": 1}}],
    }
    file.write_text(OmegaConf.to_yaml(content))
    found = with_command_file([f"hydra.searchpath=['{tmp_path}']", "experiment=own", "stage.lr=2"])
    assert found == [
        "stage=sft",
        "work_dir='a b'",
        "stage.lr=1e-05",
        "stage.mix.code=0.1",
        "stage.eval_tasks={}",
        "stage.init_from=hf:/a/b-1.0",
        "stage.eval_at_start=true",
        "stage.lora.tokens=['<|im_start|>']",
        "stage.phases=[{until:0.8,mix:{code:3}},{mix:{tools:'2 epochs',code:1}}]",
        f"hydra.searchpath=['{tmp_path}']",
        "stage.lr=2",
    ]
