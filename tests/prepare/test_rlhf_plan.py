"""The plan of rankings, reward model and RLHF: what each needs, and what is refused before anything starts."""

import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from dist_lm.errors import ArtefactError, ConfigError
from dist_lm.prepare.compose import compose_config, overrides_of
from dist_lm.stages.continuing import FREE_KEYS, differing_keys
from dist_lm.stages.registry import load_config
from dist_lm.stages.rlhf.config import rlhf_config
from dist_lm.stages.rlhf.stage import STAGE, check_inputs
from dist_lm.stages.stage import Action
from dist_lm.storage.run_directory import WorkDirectory
from dist_lm.training import checkpoint_files
from dist_lm.training.state import TrainState
from tests.conftest import TINY, TINY_MODEL
from tests.prepare.planned import actions, make_run, plan_of


@pytest.mark.heavy
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


@pytest.mark.heavy
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

FUNCTION_ONLY = ("rlhf.reward_model=none", "rlhf.rewards={mine: {kind: function, function: operator:contains}}")


IN_256 = ("stages.tools.seq_len=200", "stages.reward.seq_len=200")  # the context of the small model


@pytest.mark.heavy
def test_rlhf_needs_rankings_and_a_reward_model_only_where_it_asks_them(work):
    asking = plan_of(work, *IN_256, target="rlhf")
    assert list(actions(asking))[-4:] == ["tools", "rankings", "reward", "rlhf"]
    assert asking.stages[-1].config.rlhf.reward_model == str((work.run("reward", "default").path).resolve())
    ruled = plan_of(work, *IN_256, *RULES_ONLY, target="rlhf")
    assert not {"rankings", "reward"} & actions(ruled).keys()
    without = plan_of(work, *IN_256, *FUNCTION_ONLY, target="rlhf")
    assert list(actions(without))[-3:] == ["tools", "rankings", "rlhf"]  # rankings: its prompts
    assert without.stages[-1].config.rlhf.reward_model == "none"
    assert list(without.stages[-1].config.rlhf.rewards) == ["mine"]
    # Prompts of a file and the start of another work directory need no corpus, but a tokenizer.
    started = make_run(work, "tools", "stage.seq_len=200", "stage.init_from=none", "run_id=start", done=True)
    prompts = work.path / "prompts.txt"
    prompts.write_text("one\n")
    given = (f"stage.init_from={started.path}", f"rlhf.prompts_from={prompts}")
    alone = plan_of(work, *FUNCTION_ONLY, *given, target="rlhf")
    assert list(actions(alone)) == ["rlhf"]
    other = WorkDirectory(work.path / "other")
    command = (*FUNCTION_ONLY, *given, f"tokenizer={work.tokenizer_model}")
    assert list(actions(plan_of(other, *command, target="rlhf"))) == ["tokenizer", "rlhf"]
    # A given tokenizer is compared with the one that is here, also when no corpus asks for it.
    # (An empty message of another field: the same pieces in another file.)
    other_tokenizer = work.path / "other.model"
    other_tokenizer.write_bytes(work.tokenizer_model.read_bytes() + b"\x12\x00")
    with pytest.raises(ArtefactError, match=r"holds tokenizer [0-9a-f]{12}, tokenizer=.*other.model is .*=keep"):
        plan_of(work, *FUNCTION_ONLY, *given, f"tokenizer={other_tokenizer}", target="rlhf")
    elsewhere = make_run(work, "reward", "stage.seq_len=200", "stage.init_from=none", "run_id=elsewhere", done=True)
    given = plan_of(work, *IN_256, f"rlhf.reward_model={elsewhere.path}", target="rlhf")
    assert "reward" not in actions(given)
    assert "rankings" in actions(given)  # its prompts


@pytest.mark.heavy
def test_what_rlhf_is_given_and_is_not_there_is_refused_before_anything_starts(work):
    with pytest.raises(ArtefactError, match=r"/nowhere: no checkpoint there"):
        plan_of(work, *IN_256, "rlhf.reward_model=/nowhere", target="rlhf")
    for key in ("prompts_from", "held_out_from"):
        with pytest.raises(ConfigError, match=rf"rlhf.{key}=/nowhere.jsonl: no such file"):
            plan_of(work, *IN_256, f"rlhf.{key}=/nowhere.jsonl", target="rlhf")


@pytest.mark.heavy
def test_prompts_and_functions_that_rlhf_would_stop_at_are_refused_before_anything_starts(work, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "one"}\n\n{"text": "two"}\n')
    for key in ("prompts_from", "held_out_from"):
        with pytest.raises(ArtefactError, match=rf"^rlhf\.{key}: prompts\.jsonl line 3: no column prompt "):
            plan_of(work, *IN_256, f"rlhf.{key}={file}", target="rlhf")
    file.write_text("\n")
    with pytest.raises(ArtefactError, match=r"^rlhf\.prompts_from=.*prompts\.jsonl: no prompts"):
        plan_of(work, *IN_256, f"rlhf.prompts_from={file}", target="rlhf")
    for function, reason in (
        ("nowhere.module:score", "cannot be imported.*PYTHONPATH"),
        ("math:pi", "expected a function"),
    ):
        mine = f"rlhf.rewards={{mine: {{kind: function, function: {function}}}}}"
        with pytest.raises(ConfigError, match=rf"^rlhf\.rewards\.mine\.function={function}: {reason}"):
            plan_of(work, *IN_256, mine, target="rlhf")


@pytest.mark.heavy
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


def test_a_reward_model_whose_scores_cannot_be_normalised_is_refused_before_anything_starts(tmp_path):
    run = WorkDirectory(tmp_path).run("reward", "scores")
    newest = run.checkpoints / checkpoint_files.step_name(3)
    newest.mkdir(parents=True)
    shape = asdict(compose_config(["stage=reward", *TINY]).model)
    checkpoint_files.write_state(newest, TrainState(step=3), shape)
    checkpoint_files.write_pointer(run.checkpoints, checkpoint_files.LATEST, newest)
    run.result.write_text("{}")
    given = rlhf_config(compose_config(["stage=rlhf", *TINY_MODEL]))

    def check(reward_model: Path | str, normalise: bool = True) -> None:
        check_inputs(
            replace(given, rlhf=replace(given.rlhf, reward_model=str(reward_model), normalise_reward=normalise))
        )

    check(run.path)
    for one in (newest, f"{run.path}@3"):
        check(one, normalise=False)
        with pytest.raises(ArtefactError, match=r"rlhf\.reward_model=.*: expected the run, not a checkpoint of it"):
            check(one)
    run.result.unlink()
    with pytest.raises(ArtefactError, match=r"expected a finished run, .* \(or rlhf\.normalise_reward=false\)"):
        check(run.path)


@pytest.mark.heavy
def test_a_resumed_run_refuses_prompts_that_have_changed(work):
    start = make_run(work, "code", "stage.init_from=none", done=True)
    prompts = work.path / "prompts.txt"
    prompts.write_text("one\n")
    given = (*RULES_ONLY, f"stage.init_from={start.path}", f"rlhf.prompts_from={prompts}")
    run = make_run(work, "rlhf", *given, checkpoint=True)
    run.note_files(load_config(run.config).noted_files)
    assert actions(plan_of(work, *given, target="rlhf")) == {"rlhf": Action.RESUME}
    prompts.write_text("one\ntwo\n")
    with pytest.raises(ArtefactError, match=r"^rlhf\.prompts_from=.*prompts\.txt: has changed since .*rlhf/default"):
        plan_of(work, *given, target="rlhf")


@pytest.mark.heavy
def test_a_constraint_is_tried_before_anything_starts_and_noted_with_the_run(work):
    """Finds ranks that start for nothing, and a run that goes on under another grammar."""
    start = make_run(work, "code", "stage.init_from=none", done=True)
    prompts, form = work.path / "prompts.txt", work.path / "form.json"
    prompts.write_text("one\n")
    form.write_text('{"regex": "(a"}')
    sources = (*RULES_ONLY, f"stage.init_from={start.path}", f"rlhf.prompts_from={prompts}")
    with pytest.raises(ConfigError, match=rf"^rlhf\.constraint={form}: constraint\.regex: "):
        plan_of(work, *sources, f"rlhf.constraint={form}", target="rlhf")
    with pytest.raises(ArtefactError, match=r"^rlhf\.constraint=calls: no prompt has tools"):
        plan_of(work, *sources, "rlhf.constraint=calls", target="rlhf")

    form.write_text('{"choice": ["yes", "no"]}')
    constrained = (*sources, f"rlhf.constraint={form}")
    run = make_run(work, "rlhf", *constrained, checkpoint=True)
    run.note_files(load_config(run.config).noted_files)
    assert actions(plan_of(work, *constrained, target="rlhf")) == {"rlhf": Action.RESUME}
    with pytest.raises(ConfigError, match=r"rlhf\.constraint"):
        plan_of(work, *sources, target="rlhf")
    form.write_text('{"choice": ["yes", "no", "perhaps"]}')
    with pytest.raises(ArtefactError, match=r"^rlhf\.constraint=.*form\.json: has changed since .*rlhf/default"):
        plan_of(work, *constrained, target="rlhf")


def test_texts_are_no_prompts_of_rlhf(work):
    with pytest.raises(
        ConfigError,
        match=r"^stage\.corpus=code: stage rlhf needs conversations or rankings; corpus=local has them in "
        r"tools, rankings: give stage\.corpus=tools, or prompts from a file: rlhf\.prompts_from=FILE$",
    ):
        plan_of(work, *IN_256, "stage.corpus=code", target="rlhf")
    prompts = work.path / "prompts.txt"
    prompts.write_text("one\n")
    plan_of(work, *IN_256, *RULES_ONLY, "stage.corpus=code", f"rlhf.prompts_from={prompts}", target="rlhf")


@pytest.mark.heavy
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
    ],
)
def test_pretraining_text_that_is_none_is_refused(work, overrides, message):
    given = (*RULES_ONLY, "rlhf.pretrain_coefficient=1", "rlhf.pretrain_seq_len=200")
    with pytest.raises(ConfigError, match=f"^{message}"):
        plan_of(work, *IN_256, *given, *overrides, target="rlhf")


@pytest.mark.heavy
def test_keys_of_rlhf_belong_to_that_stage_alone(work):
    plan = plan_of(work, *IN_256, *RULES_ONLY, "rlhf.prompts=5", target="rlhf")
    assert plan.stages[-1].config.rlhf.prompts == 5
    with pytest.raises(ConfigError, match=r"^rlhf\.prompts=5: no such key"):
        plan_of(work, "rlhf.prompts=5", target="code")
    for nothing in ("rlhf.rewards.preference.weight=0", "rlhf.reward_model=none"):
        with pytest.raises(ConfigError, match=r"^rlhf\.rewards=\{\}: expected at least one part$"):
            plan_of(work, *IN_256, nothing, target="rlhf")
    with pytest.raises(ConfigError, match=r"^rlhf\.value_head=reward_model: expected zero, as there is no reward"):
        plan_of(work, *IN_256, *FUNCTION_ONLY, "rlhf.value_head=reward_model", target="rlhf")


@pytest.mark.heavy
def test_a_part_of_the_reward_that_one_of_two_runs_has_is_one_difference():
    old = compose_config(["stage=rlhf", *TINY_MODEL])
    new = compose_config(
        [
            "stage=rlhf",
            *TINY_MODEL,
            "rlhf.rewards={mine: {kind: length, target: 3}}",
            "rlhf.rewards.preference.weight=0",  # takes it away
        ]
    )
    found = differing_keys(old, new, "", FREE_KEYS)
    assert [one.partition("=")[0] for one in found] == ["rlhf.rewards.mine", "rlhf.rewards.preference"]
    assert found[0].endswith("(was None)")
    assert found[1].startswith("rlhf.rewards.preference=None (was {")
    assert differing_keys(new, new, "", FREE_KEYS) == []


def test_a_run_that_stopped_on_failures_goes_on_with_a_longer_limit():
    mine = ("stage=rlhf", *TINY_MODEL, *FUNCTION_ONLY)
    longer = ("rlhf.rewards.mine.timeout_s=60", "rlhf.max_failed_fraction=0.1")
    old, new = compose_config([*mine]), compose_config([*mine, *longer, "rlhf.rewards.mine.weight=2"])
    found = differing_keys(old, new, "", STAGE.free_keys)
    assert found == ["rlhf.rewards.mine.weight=2.0 (was 1.0)"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stage.lr=3e-6", r"stage\.lr=3e-6: no such key of stage rlhf: give rlhf\.lr in its place"),
        ("stage.warmup_steps=5", r"stage\.warmup_steps=5: .*: give rlhf\.warmup_iterations in its place"),
        ("stage.muon.lr=0.02", r"stage\.muon\.lr=0\.02: .*: leave it out"),
        ("stage.dropout=0.1", r"stage\.dropout=0\.1: .*: leave it out"),
        ("stage.mix={code: 0.1}", r"stage\.mix=\{code: 0\.1\}: .*: give rlhf\.pretrain_mix in its place"),
    ],
)
def test_keys_by_which_other_stages_train_are_refused(override, message):
    with pytest.raises(ConfigError, match=message):
        compose_config(["stage=rlhf", override])


def test_keys_of_the_stages_before_do_not_reach_rlhf():
    compose_config(overrides_of("rlhf", "rlhf", ["model=tiny", "recipe=tuned", "stages.code.lr=0.01"]))


@pytest.mark.parametrize("stage", ["reward", "preference"])
@pytest.mark.parametrize("key", ["label_smoothing", "z_loss", "mix", "document_mask", "reset_positions"])
def test_stages_that_read_rankings_have_no_keys_of_text(stage, key):
    with pytest.raises(ConfigError, match=rf"^stage\.{key}=0\.1: no such key of stage {stage}: leave it out$"):
        compose_config([f"stage={stage}", f"stage.{key}=0.1"])


@pytest.mark.parametrize(
    ("overrides", "fits"),
    [
        (("rlhf.pool.page_tokens=192", "rlhf.pool.cache_tokens=384"), True),
        (("rlhf.pool.page_tokens=192", "rlhf.pool.cache_tokens=383"), False),
        (("rlhf.pool.cache_tokens=319",), True),
        (("rlhf.pool.cache_tokens=511", "device=auto", "model.max_seq_len=257"), False),
    ],
)
def test_a_cache_has_whole_pages_for_the_longest_rollout(overrides, fits):
    given = ["stage=rlhf", *TINY_MODEL, *overrides]
    if fits:
        compose_config(given)
        return
    with pytest.raises(ConfigError, match=r"^rlhf\.pool\.cache_tokens=\d+: expected whole pages \(.*page_tokens=\d+\)"):
        compose_config(given)
