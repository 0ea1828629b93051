"""The plan: what is there is used, what is missing is built, what belongs to something else is refused by name."""

import json
import shutil
from dataclasses import asdict, replace

import numpy as np
import pytest

from dist_lm.config.corpus import SPLITS
from dist_lm.config.root import save_config
from dist_lm.data.manifest import read_manifest, record_content
from dist_lm.data.mapped import MappedCorpus
from dist_lm.data.shard_writer import CorpusWriter
from dist_lm.document import TokenizedDocument
from dist_lm.errors import ArtefactError, ConfigError
from dist_lm.launcher.compose import compose_config, overrides_of
from dist_lm.launcher.plan import make_plan, may_need
from dist_lm.stages.stage import Action
from dist_lm.stages.training import FREE_KEYS, differing_keys
from dist_lm.training import checkpoint_files
from dist_lm.training.state import TrainState
from tests.conftest import TINY, composed


def plan_of(work, *overrides, target="code"):
    command = [f"stage={target}", *TINY, f"work_dir={work.path}", *overrides]
    return make_plan(target, lambda stage: composed(overrides_of(stage, target, command)))


def actions(plan):
    return {stage.name: stage.action for stage in plan.stages}


def make_run(work, stage, *overrides, done=False, checkpoint=False):
    config = composed([f"stage={stage}", *TINY, f"work_dir={work.path}", *overrides])
    run = work.run(stage, config.run_id)
    run.create()
    plan = plan_of(work, *overrides, target=stage)
    save_config(plan.stages[-1].config, run.config)
    if checkpoint:
        directory = run.checkpoints / checkpoint_files.step_name(5)
        directory.mkdir()
        checkpoint_files.write_state(directory, TrainState(step=5), {})
        checkpoint_files.write_pointer(run.checkpoints, checkpoint_files.LATEST, directory)
    if done:
        directory = run.checkpoints / checkpoint_files.step_name(config.stage.steps)
        directory.mkdir()
        checkpoint_files.write_state(directory, TrainState(step=config.stage.steps), asdict(config.model))
        checkpoint_files.write_pointer(run.checkpoints, checkpoint_files.LATEST, directory)
        run.result.write_text(json.dumps({"steps": config.stage.steps}))
    return run


def test_every_stage_comes_after_those_it_needs():
    assert may_need("code") == ["tokenizer", "shards", "language"]
    assert may_need("tools") == ["tokenizer", "shards", "language", "code"]
    assert may_need("tokenizer") == []


def test_in_an_empty_work_directory_everything_is_built(tmp_path):
    command = ["stage=code", f"work_dir={tmp_path}"]
    plan = make_plan("code", lambda stage: compose_config(overrides_of(stage, "code", command)))
    assert set(actions(plan).values()) == {Action.BUILD}
    assert len(plan.missing) == 4


def test_what_is_there_is_used(work):
    make_run(work, "language", done=True)
    assert actions(plan_of(work)) == {
        "tokenizer": Action.READY,
        "shards": Action.READY,
        "language": Action.READY,
        "code": Action.BUILD,
    }


def test_shards_are_those_that_the_stages_read(work):
    shutil.rmtree(work.corpus("tools"))
    assert actions(plan_of(work))["shards"] is Action.READY
    plan = plan_of(work, "stage.seq_len=200", target="tools")
    assert actions(plan)["shards"] is Action.BUILD
    assert next(stage.detail for stage in plan.stages if stage.name == "shards").startswith("corpora tools (")
    assert actions(plan_of(work, target="shards"))["shards"] is Action.BUILD
    mixed = plan_of(work, "stage.mix={tools: 0.1}")
    assert actions(mixed)["shards"] is Action.BUILD


def test_a_run_with_a_checkpoint_is_continued(work):
    make_run(work, "language", checkpoint=True)
    assert actions(plan_of(work, "stages.language.seq_len=32"))["language"] is Action.RESUME


def rewritten(work, name, **change):
    """The corpus with the same documents, its last train document changed."""
    directory, before = work.corpus(name), read_manifest(work.corpus(name))
    made = []
    for split in SPLITS:
        corpus = MappedCorpus.open(directory, split)
        for number in range(corpus.n_documents):
            whole = (number, 0, int(corpus.lengths[number]))
            language = corpus.languages[corpus.language_codes[number]]
            mask = corpus.mask(*whole) if corpus.has_mask else None
            made.append((split, TokenizedDocument(corpus.tokens(*whole), 9, language, "elsewhere", "other", mask)))
    last = max(place for place, (split, _) in enumerate(made) if split == "train")
    made[last] = ("train", replace(made[last][1], **change))
    shutil.rmtree(directory)
    with CorpusWriter(directory, replace(before.recipe, shard_tokens=90_000)) as writer:
        for split, document in made:
            writer.write(split, document)
        writer.finish({}, before.licences)


def test_a_run_continues_on_the_content_that_it_began_with(work):
    """The same tokens under other names and licences, in other tars, are the same content."""
    run = make_run(work, "language", checkpoint=True)
    record_content(run, ["language"])
    rewritten(work, "language")
    rewritten(work, "code", tokens=np.array([0, 9], np.uint16))  # which the run does not read
    assert actions(plan_of(work, target="language"))["language"] is Action.RESUME
    rewritten(work, "language", tokens=np.array([0, 9], np.uint16))
    with pytest.raises(
        ArtefactError, match=r"runs/language/default began on other content of corpus language: .*train in"
    ):
        plan_of(work, target="language")
    assert actions(plan_of(work, "run_id=another", target="language"))["language"] is Action.BUILD


def test_an_unfinished_earlier_stage_with_other_settings_names_the_key_to_give(work):
    make_run(work, "language", checkpoint=True)
    with pytest.raises(ConfigError, match=r"stages\.language\.seq_len=256 \(was 32\)"):
        plan_of(work)


def test_a_finished_earlier_stage_of_another_model_is_refused(work):
    make_run(work, "language", "model.d_ff=120", done=True)
    with pytest.raises(ConfigError, match=r"model\.d_ff=80 \(was 120\)"):
        plan_of(work)


def test_prerequisites_fail_names_the_commands(work):
    with pytest.raises(ConfigError, match=r"needs language first: run `python -m dist_lm.launch stage=language`"):
        plan_of(work, "prerequisites=fail")


@pytest.mark.parametrize(
    ("change", "words"),
    [("stage.lr=0.5", "stage.lr=0.5 (was 0.03)"), ("seed=3", "seed"), ("stage.dropout=0.5", "stage.dropout=0.5")],
)
def test_a_run_with_other_settings_is_not_continued(work, change, words):
    make_run(work, "language", checkpoint=True)
    if change.startswith("seed"):
        shutil.rmtree(work.path / "corpora")
        shutil.rmtree(work.tokenizer)
    with pytest.raises(ConfigError) as refused:
        plan_of(work, change, target="language")
    assert words in str(refused.value)
    assert "another run_id" in str(refused.value)


@pytest.mark.parametrize("change", ["parallel.dp_shard=1", "stage.micro_batch=1", "cluster.ranks_per_node=4"])
def test_where_and_how_it_runs_may_change(work, change):
    make_run(work, "language", checkpoint=True)
    assert actions(plan_of(work, change, target="language"))["language"] is Action.RESUME


def test_another_vocabulary_than_the_tokenizers_is_refused(work):
    with pytest.raises(ArtefactError, match=r"holds 640 pieces, expected 600 .tokenizer.vocab_size"):
        plan_of(work, "model.vocab_size=600")


def test_shards_of_another_tokenizer_are_refused(work):
    content = bytearray(work.tokenizer_model.read_bytes())
    content[-1] ^= 1
    work.tokenizer_model.write_bytes(content)
    with pytest.raises(ArtefactError, match=r"written with tokenizer"):
        plan_of(work)


def test_shards_without_their_tokenizer_are_refused(work):
    shutil.rmtree(work.tokenizer)
    with pytest.raises(ArtefactError, match=r"corpora"):
        plan_of(work)


def test_other_text_is_refused(work):
    with pytest.raises(ArtefactError, match=r"another text than corpus=local seed=7"):
        plan_of(work, "seed=7")


def test_a_start_that_is_not_there_or_of_another_model_is_refused_before_anything_starts(work, tmp_path):
    with pytest.raises(ArtefactError, match=r"nowhere: no checkpoint there"):
        plan_of(work, f"stage.init_from={tmp_path}/nowhere", target="language")
    other = make_run(work, "language", "model.d_ff=120", "run_id=other", done=True)
    with pytest.raises(ArtefactError, match=r"another model: model.d_ff=80 \(checkpoint: 120\)"):
        plan_of(work, f"stage.init_from={other.path}", target="language")


def test_a_start_that_another_tokenizer_made_is_refused_before_anything_starts(work):
    other = make_run(work, "language", "run_id=other", done=True)
    (checkpoint,) = other.checkpoints.glob("step_*")
    state, model = checkpoint_files.read_state(checkpoint)
    checkpoint_files.write_state(checkpoint, replace(state, tokenizer="0" * 64), model)
    with pytest.raises(ArtefactError, match=r"trained with tokenizer 0{12}, not [0-9a-f]{12}"):
        plan_of(work, f"stage.init_from={other.path}", target="language")


def test_a_corpus_that_is_half_there_is_refused_with_another_tokenizer(work):
    shutil.rmtree(work.corpus("code"))
    work.tokenizer_model.write_bytes(work.tokenizer_model.read_bytes() + b"\0")
    with pytest.raises(ArtefactError, match=r"written with tokenizer"):
        plan_of(work)


def test_a_run_without_a_checkpoint_gives_way_to_other_settings(work):
    make_run(work, "language")
    assert actions(plan_of(work, "stage.lr=0.5", target="language"))["language"] is Action.BUILD


@pytest.mark.parametrize("change", ["parallel.compute_dtype=bf16", "stage.global_batch=32"])
def test_what_changes_the_numbers_may_not_change(work, change):
    make_run(work, "language", checkpoint=True)
    with pytest.raises(ConfigError, match="exists with other settings"):
        plan_of(work, change, target="language")


def test_a_start_that_is_given_makes_the_stage_before_unnecessary(work):
    other = make_run(work, "language", "run_id=other", done=True)
    assert "language" not in actions(plan_of(work, f"stage.init_from={other.path}", "run_id=new"))
    assert "language" not in actions(plan_of(work, "stage.init_from=none", "run_id=new"))


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [flip_a_byte, lambda path: path.write_bytes(path.read_bytes()[:-512]), lambda path: path.unlink()],
    ids=["flipped", "cut", "gone"],
)
def test_a_damaged_corpus_is_built_again(work, damage):
    damage(work.corpus("code") / "train-000000.tar")
    assert actions(plan_of(work))["shards"] is Action.BUILD


@pytest.mark.parametrize(
    ("damage", "said"),
    [(flip_a_byte, "manifest.json is damaged"), (lambda path: path.unlink(), "which its manifest does not name")],
)
def test_tars_that_no_manifest_names_are_not_replaced(work, damage, said):
    """Nobody knows whose they are."""
    damage(work.corpus_manifest("code"))
    with pytest.raises(ArtefactError, match=said) as refused:
        plan_of(work)
    assert f"remove {work.corpus('code')}" in str(refused.value) or "remove that folder" in str(refused.value)


def test_rankings_come_behind_the_model_that_may_be_sampled_for_them(work):
    run = make_run(work, "tools", "stage.seq_len=200", "stage.init_from=none", done=True)
    plan = plan_of(work, "stages.tools.seq_len=200", target="reward")
    assert [stage.name for stage in plan.stages][-3:] == ["tools", "rankings", "reward"]
    found = {stage.name: stage for stage in plan.stages}
    assert found["tools"].action is Action.READY
    assert "rankings" not in found["shards"].detail  # they are not its work
    assert found["rankings"].action is found["reward"].action is Action.BUILD
    assert found["reward"].config.model.head == "scalar"
    assert found["tools"].config.model.head == found["rankings"].config.model.head == "tokens"
    for name in ("rankings", "reward"):
        assert found[name].config.stage.init_from == str(run.path)
    assert found["rankings"].config.stage.corpora == ["rankings"]


def test_rankings_are_of_the_model_that_a_reward_model_is_told_to_start_from(work):
    run = make_run(work, "code", "stage.init_from=none", done=True)
    plan = plan_of(work, f"stage.init_from={run.path}", target="reward")
    assert [stage.name for stage in plan.stages] == ["tokenizer", "shards", "rankings", "reward"]
    assert {stage.config.stage.init_from for stage in plan.stages[-2:]} == {str(run.path)}
    with pytest.raises(ArtefactError, match=r"model\.d_ff=120 \(checkpoint: 80\)"):
        plan_of(work, f"stage.init_from={run.path}", "model.d_ff=120", target="reward")


RULES_ONLY = (
    "stage.corpus=tools",
    "rlhf.rewards.preference.weight=0",
    "rlhf.rewards={size: {kind: length, target: 9}}",
)


IN_256 = ("stages.tools.seq_len=200", "stages.reward.seq_len=200")  # the context of the small model


def test_rlhf_needs_rankings_and_a_reward_model_only_where_it_asks_them(work):
    asking = plan_of(work, *IN_256, target="rlhf")
    assert list(actions(asking))[-4:] == ["tools", "rankings", "reward", "rlhf"]
    assert asking.stages[-1].config.rlhf.reward_model == str((work.run("reward", "default").path).resolve())
    ruled = plan_of(work, *IN_256, *RULES_ONLY, target="rlhf")
    assert not {"rankings", "reward"} & actions(ruled).keys()
    elsewhere = make_run(work, "reward", "stage.seq_len=200", "stage.init_from=none", "run_id=elsewhere", done=True)
    given = plan_of(work, *IN_256, f"rlhf.reward_model={elsewhere.path}", target="rlhf")
    assert "reward" not in actions(given)
    assert "rankings" in actions(given)  # its prompts


def test_what_rlhf_is_given_and_is_not_there_is_refused_before_anything_starts(work):
    with pytest.raises(ArtefactError, match=r"/nowhere: no checkpoint there"):
        plan_of(work, *IN_256, "rlhf.reward_model=/nowhere", target="rlhf")
    for key in ("prompts_from", "held_out_from"):
        with pytest.raises(ConfigError, match=rf"rlhf.{key}=/nowhere.jsonl: no such file"):
            plan_of(work, *IN_256, f"rlhf.{key}=/nowhere.jsonl", target="rlhf")


def test_prompts_and_functions_that_rlhf_would_stop_at_are_refused_before_anything_starts(work, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "one"}\n\n{"text": "two"}\n')
    for key in ("prompts_from", "held_out_from"):
        with pytest.raises(ArtefactError, match=rf"^rlhf\.{key}: prompts\.jsonl line 3: expected an object"):
            plan_of(work, *IN_256, f"rlhf.{key}={file}", target="rlhf")
    file.write_text("\n")
    with pytest.raises(ArtefactError, match=r"^rlhf\.prompts_from=.*prompts\.jsonl: no prompts"):
        plan_of(work, *IN_256, f"rlhf.prompts_from={file}", target="rlhf")
    for function, reason in (("nowhere.module:score", "cannot be imported"), ("math:pi", "expected a function")):
        mine = f"rlhf.rewards={{mine: {{kind: function, function: {function}}}}}"
        with pytest.raises(ConfigError, match=rf"^rlhf\.rewards\.mine\.function={function}: {reason}"):
            plan_of(work, *IN_256, mine, target="rlhf")


def test_a_reward_model_of_another_stage_or_tokenizer_is_refused_before_anything_starts(work):
    code = make_run(work, "code", "stage.init_from=none", "run_id=other", done=True)
    with pytest.raises(
        ArtefactError, match=rf"^rlhf\.reward_model={code.path}: .*head=tokens.*expected a run of stage reward"
    ):
        plan_of(work, *IN_256, f"rlhf.reward_model={code.path}", target="rlhf")
    other = work.run("reward", "larger").checkpoints / checkpoint_files.step_name(1)
    other.mkdir(parents=True)
    shape = compose_config(["stage=reward", *TINY]).model
    checkpoint_files.write_state(other, TrainState(step=1), asdict(shape) | {"vocab_size": 600})
    with pytest.raises(ArtefactError, match=r"head=scalar and 600 tokens; expected .* with this tokenizer"):
        plan_of(work, *IN_256, f"rlhf.reward_model={other}", target="rlhf")


def test_texts_are_no_prompts_of_rlhf(work):
    with pytest.raises(
        ConfigError,
        match=r"^stage\.corpus=code: expected conversations or rankings, .* "
        r"\(tools, rankings\); or give rlhf",
    ):
        plan_of(work, *IN_256, "stage.corpus=code", target="rlhf")
    prompts = work.path / "prompts.txt"
    prompts.write_text("one\n")
    plan_of(work, *IN_256, *RULES_ONLY, "stage.corpus=code", f"rlhf.prompts_from={prompts}", target="rlhf")


def test_pretraining_text_of_rlhf_is_built_where_it_has_a_weight(work):
    run = make_run(work, "code", "stage.init_from=none", done=True)
    prompts = work.path / "prompts.txt"
    prompts.write_text("one\n")
    start = (*RULES_ONLY, f"stage.init_from={run.path}", f"rlhf.prompts_from={prompts}")
    assert list(actions(plan_of(work, *start, target="rlhf"))) == ["rlhf"]
    shutil.rmtree(work.corpus("code"))
    text = (*start, "rlhf.pretrain_coefficient=1", "rlhf.pretrain_seq_len=200")
    plan = plan_of(work, *text, target="rlhf")
    assert actions(plan) == {"tokenizer": Action.READY, "shards": Action.BUILD, "rlhf": Action.BUILD}
    assert plan.stages[1].config.stage.corpora == ["code"]
    mixed = plan_of(work, *text, "rlhf.pretrain_corpus=tools", "rlhf.pretrain_mix={language: 0.2}", target="rlhf")
    assert actions(mixed)["shards"] is Action.READY
    assert mixed.stages[1].config.stage.corpora == ["language", "tools"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("rlhf.pretrain_corpus=rankings",),
            r"rlhf\.pretrain_corpus=rankings: expected a text of corpus=local: ",
        ),
        (
            ("rlhf.pretrain_mix={code: 0.2}",),
            r"rlhf\.pretrain_mix=code: expected texts of corpus=local beside ",
        ),
        (
            ("rlhf.pretrain_mix={language: 1.5}",),
            r"rlhf\.pretrain_mix\.language=1\.5: expected below 1, in whole per cent",
        ),
        (("rlhf.pretrain_seq_len=257",), r"rlhf\.pretrain_seq_len=257: expected at most model\.max_seq_len=256"),
        (("rlhf.pretrain_sequences=0",), r"rlhf\.pretrain_sequences=0: expected a positive integer"),
        (("stage.mix={code: 0.2}",), r"stage\.mix=code: expected none"),
    ],
)
def test_pretraining_text_that_is_none_is_refused(work, overrides, message):
    given = (*RULES_ONLY, "rlhf.pretrain_coefficient=1", "rlhf.pretrain_seq_len=200")
    with pytest.raises(ConfigError, match=f"^{message}"):
        plan_of(work, *IN_256, *given, *overrides, target="rlhf")


@pytest.mark.parametrize("given", ["stage.corpus=rankings", "stage.mix={rankings: 0.1}"])
def test_rankings_are_no_text_to_predict(work, given):
    with pytest.raises(ConfigError, match=r"^stage\.(corpus|mix)=rankings: expected texts or conversations"):
        plan_of(work, given, target="code")


def test_keys_of_rlhf_belong_to_that_stage_alone(work):
    plan = plan_of(work, *IN_256, *RULES_ONLY, "rlhf.prompts=5", target="rlhf")
    assert plan.stages[-1].config.rlhf.prompts == 5
    with pytest.raises(ConfigError, match=r"^rlhf\.prompts=5: no such key"):
        plan_of(work, "rlhf.prompts=5", target="code")
    with pytest.raises(ConfigError, match=r"^rlhf\.rewards=\{\}: expected at least one part$"):
        plan_of(work, *IN_256, "rlhf.rewards.preference.weight=0", target="rlhf")


def test_a_part_of_the_reward_that_one_of_two_runs_has_is_one_difference():
    old = compose_config(["stage=rlhf", *TINY])
    new = compose_config(
        [
            "stage=rlhf",
            *TINY,
            "rlhf.rewards={mine: {kind: length, target: 3}}",
            "rlhf.rewards.preference.weight=0",  # takes it away
        ]
    )
    found = differing_keys(old, new, "", FREE_KEYS)
    assert [one.partition("=")[0] for one in found] == ["rlhf.rewards.mine", "rlhf.rewards.preference"]
    assert found[0].endswith("(was None)")
    assert found[1].startswith("rlhf.rewards.preference=None (was {")
    assert differing_keys(new, new, "", FREE_KEYS) == []
