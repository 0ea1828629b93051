"""The plan: what is there is used, what is missing is built, what belongs to something else is refused by name."""

import shutil
from dataclasses import replace

import numpy as np
import pytest

from dist_lm.config.corpus import SPLITS
from dist_lm.data.manifest import read_manifest, record_content
from dist_lm.data.shard_writer import CorpusWriter
from dist_lm.data.token_corpus import TokenCorpus
from dist_lm.document import TokenizedDocument
from dist_lm.errors import ArtefactError, ConfigError
from dist_lm.prepare.compose import compose_config, overrides_of
from dist_lm.prepare.plan import make_plan, may_need
from dist_lm.stages.generate.stage import newest_run
from dist_lm.stages.stage import Action
from dist_lm.training import checkpoint_files
from tests.prepare.planned import actions, make_run, plan_of


def test_every_stage_comes_after_those_it_needs():
    assert may_need("code") == ["tokenizer", "shards", "language"]
    assert may_need("tools") == ["tokenizer", "shards", "language", "code"]
    assert may_need("tokenizer") == []


@pytest.mark.heavy
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


@pytest.mark.heavy
def test_shards_are_those_that_the_stages_read(work):
    shutil.rmtree(work.corpus("tools"))
    assert actions(plan_of(work))["shards"] is Action.READY
    plan = plan_of(work, "stage.seq_len=200", target="tools")
    assert actions(plan)["shards"] is Action.BUILD
    assert next(stage.detail for stage in plan.stages if stage.name == "shards").startswith("corpora tools (")
    assert actions(plan_of(work, target="shards"))["shards"] is Action.BUILD
    mixed = plan_of(work, "stage.mix={tools: 0.1}")
    assert actions(mixed)["shards"] is Action.BUILD


@pytest.mark.heavy
def test_a_corpus_file_of_rankings_alone_needs_no_prompts_of_code(work, tmp_path):
    """Finds a refusal of the corpus `code`, whose prompts only samples of a model would need."""
    (tmp_path / "r.jsonl").write_text('{"prompt": "A?", "completions": ["B", "C"], "ranks": [0, 1]}\n')
    source = f"{{reader: %s, dataset: {tmp_path / 'r.jsonl'}, language: own, licence: own}}"
    corpora, start = f"corpus.corpora={{rankings: [{source}]}}", ("stage.init_from=none", "tokenizer=keep")
    plan = plan_of(work, corpora % "rankings", *start, target="reward")
    assert {stage.name: stage.detail for stage in plan.stages}["shards"] == "no corpus to build"
    assert actions(plan)["rankings"] is Action.BUILD
    with pytest.raises(ConfigError, match=r"stage\.corpus=code: expected one of"):
        plan_of(work, corpora % "synthetic_rankings", *start, target="reward")


def test_a_run_with_a_checkpoint_is_continued(work):
    make_run(work, "language", checkpoint=True)
    same = [f"stages.language.{one}" for one in ("seq_len=32", "rates.embedding=1", "muon.variance_beta=0")]
    assert actions(plan_of(work, *same))["language"] is Action.RESUME


@pytest.mark.heavy
@pytest.mark.parametrize("actors", [-5, 1])
def test_actors_for_tasks_that_no_stage_has_are_refused(work, actors):
    with pytest.raises(ConfigError, match=rf"^eval\.pool\.actors={actors}: expected 0 without stage\.eval_tasks"):
        plan_of(work, f"eval.pool.actors={actors}")
    plan_of(work, "stages.code.eval_tasks={own_python: 0}", "eval.pool.actors=1", target="tools")
    plan_of(work, "eval.pool.actors=1", target="tokenizer")  # trains no model


@pytest.mark.heavy
def test_a_run_whose_newest_checkpoint_was_removed_continues_from_the_one_before_with_the_same_settings(work):
    run = make_run(work, "language", checkpoint=True)
    newest = run.checkpoints / checkpoint_files.step_name(10)
    checkpoint_files.write_pointer(run.checkpoints, checkpoint_files.LATEST, newest)
    assert not newest.exists()
    plan = plan_of(work, target="language")
    assert actions(plan)["language"] is Action.RESUME
    assert plan.target.detail.startswith("from step_00000005")
    with pytest.raises(ConfigError, match=r"stage\.dropout=0\.5 \(was 0"):
        plan_of(work, "stage.dropout=0.5", target="language")
    (run.checkpoints / checkpoint_files.LATEST).unlink()
    assert newest_run(work) == run


def rewritten(work, name, **change):
    """The corpus with the same documents, its last train document changed."""
    directory, before = work.corpus(name), read_manifest(work.corpus(name))
    made = []
    for split in SPLITS:
        corpus = TokenCorpus.open(directory, split)
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


@pytest.mark.heavy
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


@pytest.mark.heavy
def test_a_finished_earlier_stage_of_another_model_is_refused(work):
    make_run(work, "language", "model.d_ff=120", done=True)
    with pytest.raises(ConfigError, match=r"model\.d_ff=80 \(was 120\)"):
        plan_of(work)


@pytest.mark.heavy
def test_prerequisites_fail_names_the_commands(work):
    with pytest.raises(ConfigError, match=r"needs language first: run `python -m dist_lm.launch stage=language`"):
        plan_of(work, "prerequisites=fail")


@pytest.mark.heavy
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


@pytest.mark.heavy
@pytest.mark.parametrize("change", ["parallel.dp_shard=1", "stage.micro_batch=1", "cluster.ranks_per_node=4"])
def test_where_and_how_it_runs_may_change(work, change):
    make_run(work, "language", checkpoint=True)
    assert actions(plan_of(work, change, target="language"))["language"] is Action.RESUME


@pytest.mark.heavy
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


@pytest.mark.heavy
def test_a_tokenizer_of_another_text_is_kept_while_corpora_need_it(work):
    """Finds a new tokenizer that makes finished corpora useless, and a plan that keeps the old one without a word."""
    plan = plan_of(work, "seed=7")
    assert actions(plan)["tokenizer"] is Action.READY
    detail = next(stage.detail for stage in plan.stages if stage.name == "tokenizer")
    assert "kept although it was trained on another text; written with it: code, language, tools" in detail
    shutil.rmtree(work.path / "corpora")
    with pytest.raises(ArtefactError, match=r"another text than corpus=local seed=7"):
        plan_of(work, "seed=7")


@pytest.mark.heavy
def test_a_start_that_is_not_there_or_of_another_model_is_refused_before_anything_starts(work, tmp_path):
    with pytest.raises(ArtefactError, match=r"nowhere: no checkpoint there"):
        plan_of(work, f"stage.init_from={tmp_path}/nowhere", target="language")
    other = make_run(work, "language", "model.d_ff=120", "run_id=other", done=True)
    with pytest.raises(ArtefactError, match=r"another model: model.d_ff=80 \(checkpoint: 120\)"):
        plan_of(work, f"stage.init_from={other.path}", target="language")


@pytest.mark.heavy
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


@pytest.mark.heavy
@pytest.mark.parametrize("change", ["parallel.compute_dtype=bf16", "stage.global_batch=32"])
def test_what_changes_the_numbers_may_not_change(work, change):
    make_run(work, "language", checkpoint=True)
    with pytest.raises(ConfigError, match="exists with other settings"):
        plan_of(work, change, target="language")


@pytest.mark.heavy
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


@pytest.mark.parametrize("given", ["stage.corpus=rankings", "stage.mix={rankings: 0.1}"])
def test_rankings_are_no_text_to_predict(work, given):
    with pytest.raises(ConfigError, match=r"^stage\.(corpus|mix)=rankings: expected texts or conversations"):
        plan_of(work, given, target="code")
