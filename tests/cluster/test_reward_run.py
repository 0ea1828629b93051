"""Stage reward: from a model of tokens, the same numbers on any layout and after a kill; figures and normaliser."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist

from dist_lm.chat.documents import encode_ranking, write_ranking
from dist_lm.chat.messages import Conversation, Message
from dist_lm.chat.ranking import Judgement, Ranking
from dist_lm.data.rankings.shards import RankingCorpus
from dist_lm.data.rankings.stream import ALL, RankingStream
from dist_lm.data.shard_writer import CorpusWriter
from dist_lm.document import Document
from dist_lm.errors import ArtefactError, ConfigError
from dist_lm.model.keyed_random import initialise
from dist_lm.model.transformer import Transformer
from dist_lm.parallel.mesh import World
from dist_lm.prepare.compose import compose_config
from dist_lm.rlhf.reward_model import read_reward_scale
from dist_lm.stages.registry import load_config
from dist_lm.stages.reward.ranks import score_samples
from dist_lm.stages.reward.stage import Reward
from dist_lm.stages.shards.identity import recipe_of
from dist_lm.stages.training.stage import EvaluationArguments
from dist_lm.storage.run_directory import RunDirectory, WorkDirectory
from dist_lm.tokenizer.tokenizer import Tokenizer
from dist_lm.training.checkpoint_tensors import model_weights
from dist_lm.verbs.data_step import slices_of_step
from tests.conftest import TINY, TINY_MODEL
from tests.training_run import STEPS, copy_until, linked, numbers, prepare, tolerance, train, unwritten, write_untrained

pytestmark = pytest.mark.cluster
WORDS = ("value", "name", "count", "total", "index", "result", "table", "line")
SETTINGS = (
    "stage.seq_len=96",
    "stage.dropout=0",
    "stage.global_batch=4",
    "stage.reward.label_noise=0.1",
    "stage.reward.normaliser_prompts=4",
    "stage.reward.normaliser_new_tokens=6",
    "stage.lr=3e-3",
    "parallel.compute_dtype=fp32",
)


def rankings(count: int) -> list[Ranking]:
    """More of the first words are better; every fifth is judged by a pair."""
    made = []
    for i in range(count):
        k = 2 + i % 4
        completions = tuple(f"{WORDS[(i + j) % 8]} {WORDS[0] * (1 + j)}" for j in range(k))
        prompt = Conversation((Message("user", f"The {WORDS[i % 8]} number {i}?"),))
        if i % 5:
            made.append(Ranking(prompt, completions, ranks=tuple(range(k))[::-1]))
        else:
            made.append(Ranking(prompt, completions, judgements=(Judgement(1, 0, 0.5),)))
    return made


@pytest.fixture(scope="module")
def work(tiny_work: WorkDirectory, tmp_path_factory: pytest.TempPathFactory) -> WorkDirectory:
    """With a corpus of rankings, and an untrained run of stage tools."""
    work = linked(tiny_work, tmp_path_factory.mktemp("reward"))
    (work.path / "corpora").unlink()
    tokenizer = Tokenizer.load(work.tokenizer_model)
    config = compose_config(["stage=rankings", *TINY_MODEL, f"work_dir={work.path}"])
    recipe = replace(recipe_of(config, "rankings"), documents_per_member=32, shard_tokens=4_000)
    with CorpusWriter(work.corpus("rankings"), recipe) as writer:
        for split, part in (("train", rankings(120)), ("val", rankings(150)[120:])):
            for i, one in enumerate(part):
                document = Document(write_ranking(one), ("a", "b")[i % 2], f"made:{i}", "none", "0" * 64, "ranking")
                writer.write(split, encode_ranking(tokenizer, document))
        writer.finish({}, [source.licence for source in config.corpus.corpora["rankings"]])
    write_untrained(work, "tools", 4)
    return work


@pytest.fixture(scope="module")
def reference(work: WorkDirectory) -> RunDirectory:
    """One rank, never disturbed."""
    run = reward_run(work, "one")
    train(run, ranks=1)
    return run


def reward_run(work: WorkDirectory, run_id: str, *overrides: str) -> RunDirectory:
    start = f"stage.init_from={work.run('tools', 'default').path}"
    return prepare(work, run_id, *SETTINGS, start, *overrides, stage="reward")


@pytest.mark.heavy
def test_it_learns_and_says_so_overall_by_size_and_by_source(reference: RunDirectory) -> None:
    found = numbers(reference)
    names = {f"reward/{figure}" for figure in ("accuracy", "kendall_tau", "top1", "calibration_error")}
    wanted = names | {f"{name}{part}" for name in names for part in ("_a", "_b", "_k2", "_k5")}
    for step in (0, 10, STEPS):
        assert wanted | {"val/loss", "val/loss_a"} <= found[step].keys()
    assert found[STEPS]["val/loss"] < found[0]["val/loss"]
    assert found[STEPS]["reward/accuracy"] > 0.9
    result = json.loads(reference.result.read_text())
    assert result["before"].keys() >= wanted
    assert result["packing"]["documents"] == 120
    assert "gzip_bits_per_byte" not in result  # rankings are no text


@pytest.mark.heavy
def test_a_run_writes_every_metric_of_its_stage(reference: RunDirectory) -> None:
    assert unwritten(reference, "reward") == set()


@pytest.mark.heavy
def test_it_starts_from_all_weights_but_the_head(work: WorkDirectory, tmp_path: Path) -> None:
    run = reward_run(work, "start", "stage.steps=1", "stage.warmup_steps=0", "stage.lr=1e-12", "stage.weight_decay=0")
    train(run, ranks=1)
    start = model_weights(work.run("tools", "default").checkpoints / "step_00000005")
    found = model_weights(run.checkpoints / "step_00000001")
    assert found.keys() - start.keys() == {"scalar_head.weight", "scalar_head.bias"}
    assert start.keys() - found.keys() <= {"lm_head.weight"}
    for name in found.keys() & start.keys():
        np.testing.assert_allclose(found[name], start[name], atol=1e-9, err_msg=name)


@pytest.mark.heavy
def test_the_normaliser_is_that_of_samples_of_the_first_model(reference: RunDirectory) -> None:
    normaliser, metrics = read_reward_scale(reference), numbers(reference)[STEPS]
    assert (normaliser.mean, normaliser.std) == (metrics["reward/score_mean"], metrics["reward/score_std"])
    assert metrics["reward/scored"] == 4
    assert normaliser.std > 0


@pytest.fixture
def _alone(work: WorkDirectory) -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.heavy
@pytest.mark.usefixtures("_alone")
def test_completions_of_val_are_scored_where_no_prompt_leaves_room_for_an_answer(work: WorkDirectory, caplog) -> None:
    given = (f"work_dir={work.path}", f"stage.init_from={work.run('tools', 'default').path}")
    with pytest.raises(ConfigError, match=r"normaliser_new_tokens=256: expected less than model\.max_seq_len=256"):
        Reward().check(compose_config(["stage=reward", *TINY, *given, "stage.reward.normaliser_new_tokens=256"]))
    config = compose_config(["stage=reward", *TINY, *given, "stage.reward.normaliser_new_tokens=252"])
    model = Transformer(config.model)
    initialise(model, 0)
    tokenizer, world = Tokenizer.load(work.tokenizer_model), World(0, 1, 0, model.embedding.weight.device)
    arguments = EvaluationArguments(config, work.run("reward", "any"), world, tokenizer, lambda: model, 1)
    assert score_samples(arguments)["reward/scored"] > 30
    assert "no prompt of val leaves room for such answers" in caplog.text
    short = ("model.max_seq_len=8", "stage.seq_len=8", "stage.reward.normaliser_new_tokens=4")
    with pytest.raises(ArtefactError, match=r"has at most model\.max_seq_len=8 tokens"):
        score_samples(
            replace(arguments, config=compose_config(["stage=reward", *TINY, "stage.init_from=none", *short]))
        )


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        pytest.param(2, (), id="fsdp", marks=pytest.mark.bars),
        pytest.param(2, ("parallel.tp=2",), id="tp"),
    ],
)
def test_the_numbers_do_not_depend_on_the_layout(
    reference: RunDirectory, work: WorkDirectory, ranks: int, layout: tuple[str, ...]
) -> None:
    run = reward_run(work, f"on_{len(layout)}", "stage.micro_batch=1", *layout)
    train(run, ranks)
    expected, found = numbers(reference), numbers(run)
    assert found.keys() == expected.keys()
    for step, line in expected.items():
        for key, value in line.items():
            # rankings do not say where zero is: the gradient of the head's bias is rounding, of which Adam makes steps
            # of stage.lr; the normaliser takes it out again
            off = STEPS * 3e-3 if key == "reward/score_mean" else 1e-6
            assert found[step][key] == pytest.approx(value, rel=2 * tolerance(key), abs=off), (step, key)


@pytest.mark.heavy
def test_a_run_that_goes_on_from_a_checkpoint_ends_bit_identical(reference: RunDirectory, work: WorkDirectory) -> None:
    run = work.run("reward", "again")
    copy_until(reference, run, step=10)
    train(run, ranks=1)
    assert numbers(run) == numbers(reference)


@pytest.mark.heavy
def test_the_rankings_of_a_step_are_those_that_its_ranks_read(reference: RunDirectory) -> None:
    """Finds `data step` that packs rankings as conversations, or in another order."""
    config = load_config(reference.config)
    train = RankingCorpus.open(reference.corpus(config.stage.corpus), "train")
    used = slices_of_step(reference, STEP := 2)
    assert all((part.start, part.stop) == (0, part.document_tokens) for part in used)

    n = config.stage.global_batch
    ranks = {"global_batch": n, "micro_batch": n, "dp_rank": 0, "dp_size": 1, "position": n * (STEP - 1)}
    with RankingStream(train, ALL, 0.0, seed=config.seed, seq_len=config.stage.seq_len, pad_id=0, **ranks) as stream:
        (batch,) = next(stream).micro_batches
    for row, sequence in enumerate(batch.sequence_B.tolist()):
        documents = [part.document for part in used if part.sequence == sequence]
        tokens = [token for each in documents for token in train.corpus.tokens(each, 0, train.corpus.lengths[each])]
        assert sorted(batch.tokens_BT[row, : len(tokens)].tolist()) == sorted(tokens)
