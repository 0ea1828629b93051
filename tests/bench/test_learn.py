"""Recipes side by side: a learner is a run, all have one stream and one budget, and what is reported."""

import json
import shlex
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from dist_lm.__main__ import app
from dist_lm.bench.learn import TIMED, WARM_UP, Budget, alone, run_learning, steps_of
from dist_lm.bench.learn_peers import NanochatLearner, _Peer, peer_recipe
from dist_lm.bench.learn_recipes import recipes_of
from dist_lm.bench.learn_report import Curve, Point, drawing, records_of, table_of
from dist_lm.config.corpus import TokenizerConfig
from dist_lm.data.batch import Batch
from dist_lm.data.shard_writer import CorpusWriter
from dist_lm.data.token_corpus import TokenCorpus
from dist_lm.errors import ConfigError
from dist_lm.prepare.compose import compose_config
from dist_lm.stages.shards.identity import recipe_of
from dist_lm.tokenizer.tokenizer import Tokenizer
from dist_lm.tokenizer.train import train_tokenizer
from tests.conftest import TINY, texts
from tests.training_run import linked, prepare, train

SETTINGS = (
    *("stage=code", *TINY, "model.init_std=0.1", "stage.global_batch=8", "stage.micro_batch=4", "stage.lr=1e-2"),
    *(
        "stage.warmup_steps=2",
        "stage.dropout=0.1",
        "stage.label_smoothing=0.1",
        "stage.eval_sequences=0",
        "stage.muon.lr=0.02",
    ),
)
SAME_AS_A_RUN = ("stage.document_mask=false", "stage.reset_positions=false", "stage.init_from=none")
MUON = "stage.muon.lr=null stage.muon.scale=adamw stage.muon.momentum_warmup_steps=4"


def learn(tiny_work, folder, *overrides: str, **changed):
    options = {"recipes": [], "peers": [], "budget": f"{6 * 8 * 32}tokens", "seeds": 1} | changed
    with (folder / "table").open("w") as table:
        return run_learning(
            [*SETTINGS, f"work_dir={tiny_work.path}", *overrides],
            Console(file=table, width=120),
            json_file=folder / "records.jsonl",
            curves_in=folder / "curves",
            **options,
        )


@pytest.mark.heavy
def test_a_learner_is_the_run_of_its_recipe(tiny_work, tmp_path):
    recipe = f"{MUON} stage.rates.embedding=3 stage.fim_rate=0.5 'stage.mix={{language: 0.25}}'"
    curves = learn(tiny_work, tmp_path, recipes=[f"other: {recipe}"])
    plain, other = curves
    assert (plain.recipe, other.recipe) == ("as configured", "other")
    own = linked(tiny_work, tmp_path / "work")
    run = prepare(own, "learned", *SETTINGS[1:], *SAME_AS_A_RUN, *shlex.split(recipe), "stage.steps=6", stage="code")
    result = train(run, 1)
    assert other.end.loss == pytest.approx(result["metrics"]["val/loss"], rel=1e-5)
    assert other.end.bits_per_byte == pytest.approx(result["metrics"]["val/bits_per_byte"], rel=1e-5)
    assert plain.end.loss != pytest.approx(other.end.loss, rel=1e-3)
    assert [point.tokens for point in plain.points] == [step * 8 * 32 for step in range(7)]
    assert plain.points[0].loss == other.points[0].loss  # one initial model, one set of held-out sequences


@pytest.mark.heavy
def test_a_seed_changes_the_model_and_the_order_and_gpt_neox_learns_beside_it(tiny_work, tmp_path):
    curves = learn(
        tiny_work, tmp_path, "seed=3", seeds=2, peers=["neox: stage.lr=3e-3 stage.dropout=0"], budget="1.5e9flops"
    )
    assert [(curve.recipe, curve.seed) for curve in curves] == [
        (name, seed) for seed in (3, 4) for name in ("as configured", "GPT-NeoX of transformers")
    ]
    assert curves[0].end.loss != curves[2].end.loss
    assert curves[0].parameters == curves[1].parameters
    for curve in curves:
        assert curve.end.loss < curve.points[0].loss
        assert 1.5e9 - curve.end.flops / curve.steps < curve.end.flops <= 1.5e9
    written = [json.loads(line) for line in (tmp_path / "curves" / "curves.jsonl").read_bytes().splitlines()]
    assert len(written) == sum(len(curve.points) for curve in curves)
    assert "GPT-NeoX of transformers" in (tmp_path / "table").read_text()


@pytest.mark.heavy
def test_a_budget_of_seconds_is_divided_by_the_speed_that_is_found(tiny_work, tmp_path):
    (curve,) = learn(
        tiny_work, tmp_path, "stage.warmup_steps=0", budget="2s"
    )  # a step takes half a second on a busy machine
    assert curve.steps >= 1
    assert len(curve.points) <= 11


def other_pieces(work, documents):
    """The corpus code of a work directory in 512 pieces that cross scripts; the last tenth of `documents` is val."""
    config = TokenizerConfig(vocab_size=512, split_by_unicode_script=False, max_piece_length=32)
    train_tokenizer([one.text for one in documents], work.tokenizer_model, config)
    tokenizer = Tokenizer.load(work.tokenizer_model)
    shutil.rmtree(work.corpus("code"))
    composed = compose_config(["stage=code", *TINY, "model.vocab_size=512", f"work_dir={work.path}"])
    with CorpusWriter(work.corpus("code"), replace(recipe_of(composed, "code"), documents_per_member=64)) as writer:
        for number, document in enumerate(documents, len(documents) // 10 - len(documents)):
            writer.write("train" if number < 0 else "val", tokenizer.encode_document(document))
        writer.finish({}, [source.licence for source in composed.corpus.corpora["code"]])
    return f"other: work_dir={work.path} model.vocab_size=512"


@pytest.mark.heavy
def test_other_tokenizers_are_compared_on_the_same_text(tiny_work, work, tmp_path):
    documents = [one for language in ("python", "bash", "sql") for one in texts(language, 200)]
    recipe = other_pieces(work, documents)
    plain, other = learn(tiny_work, tmp_path, recipes=[recipe], budget="2e9flops", points=1)
    assert len(plain.points) == len(other.points) == 2
    assert other.parameters < plain.parameters
    assert plain.end.tokens < other.end.tokens  # fewer pieces make a token cheaper
    for curve, folder in ((plain, tiny_work), (other, work)):
        val = TokenCorpus.open(folder.corpus("code"), "val")
        assert val.n_bytes.sum() == sum(len(one.text.encode()) for one in documents[-60:])
        expected = curve.end.loss * val.n_tokens / np.log(2) / val.n_bytes.sum()
        assert curve.end.bits_per_byte == pytest.approx(expected, rel=1e-6)
        assert curve.bytes_per_token == pytest.approx({"sql": val.n_bytes.sum() / val.n_tokens})
        assert curve.bits_by == pytest.approx({"sql": curve.end.bits_per_byte})
    assert "held-out bytes a token" in (tmp_path / "table").read_text()
    records = [json.loads(line) for line in (tmp_path / "records.jsonl").read_bytes().splitlines()]
    found = {(one["case"], one["unit"]): one["value"] for one in records}
    assert found["other", "bytes/token sql"] == pytest.approx(other.bytes_per_token["sql"])
    # the whole of val, a vocabulary that fits, the same documents
    for said, options in (
        ("other: work_dir=.* stage.eval_sequences=8 of them are not the same text", ["stage.eval_sequences=8"]),
        ("other: model.vocab_size=512: .* has 640 pieces: expected model.vocab_size=640", []),
    ):
        given = recipe if options else "other: model.vocab_size=512"
        with pytest.raises(ConfigError, match=said):
            learn(tiny_work, tmp_path, *options, recipes=[given], budget="1s")  # before anything is timed
    other_pieces(work, documents[:-10])
    with pytest.raises(ConfigError, match=r"other: val of work_dir=.*: expected the same documents"):
        learn(tiny_work, tmp_path, recipes=[recipe])


@pytest.mark.parametrize(
    ("text", "cost", "steps"),
    [("4000tokens", 400, 10), ("4399tokens", 400, 10), ("1e6flops", 4e4, 25), ("30s", 1.5, 20)],
)
def test_a_budget_pays_for_whole_steps(text, cost, steps):
    assert Budget.parse(text).steps("a", cost) == steps


@pytest.mark.heavy
def test_speeds_are_found_in_turns(tiny_work):
    taken = []

    class Fake:
        flops_per_token, parameters = 1.0, 1

        def __init__(self, config, steps, device):
            self.lr = config.stage.lr

        def step(self, number, micro_batches):
            taken.append(self.lr)

    recipes = recipes_of([*SETTINGS, f"work_dir={tiny_work.path}"], ["b: stage.lr=2"], [])
    with alone():
        steps_of([replace(one, build=Fake) for one in recipes], Budget(1e9, "s"), torch.device("cpu"))
    assert taken[2 * WARM_UP :] == [0.01, 2.0] * TIMED


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"budget": "3 minutes"}, "--budget=3 minutes: expected a number and a unit"),
        ({"budget": "1.2.3s"}, "--budget=1.2.3s: expected a number and a unit"),
        ({"seeds": 0}, "--seeds=0: expected a positive integer"),
        ({"points": 0}, "--points=0: expected a positive integer"),
        ({"recipes": ["stage.lr=1"]}, "--recipe=stage.lr=1: expected NAME: KEY=VALUE"),
        ({"recipes": ["a: stage.lr=1", "a: stage.lr=2"]}, "--recipe or --peer a: the name is taken"),
        ({"peers": ["gpt: x"]}, "--peer=gpt: expected neox or nanochat"),
        ({"peers": ["nanochat: /nowhere"]}, "--peer=nanochat: /nowhere: expected the path of a checkout"),
        ({"peers": ["neox: model.norm=rmsnorm"]}, "--peer=neox: the model is Arcee; expected GPT-NeoX"),
        ({"peers": ["nanochat: ."]}, "expected the path of a checkout"),
        ({"recipes": ["a: 'stage.lr=1"]}, "--recipe=a: 'stage.lr=1: No closing quotation"),
        ({"recipes": ["a: seed=7"]}, "a: seed=7: all recipes have the same seeds"),
        ({"recipes": ["a: stage.ema_decay=0.9"]}, "a: stage.ema_decay=0.9"),
        ({"recipes": ["a: stage.lora.rank=2 stage.init_from=b@1"]}, "a: stage.lora.rank=2"),
        ({"recipes": ["a: stage.init_from=auto"]}, "a: stage.init_from=auto"),
        ({"recipes": ["a: stage.branch_from=b@1"]}, "a: stage.branch_from=b@1"),
        ({"budget": "100tokens"}, "--budget=100tokens: a step of as configured costs 256tokens"),
        ({"recipes": ["a: stage=reward"]}, "a: stage=reward: the loss of the next token is measured"),
        ({"budget": "300tokens"}, "as configured: stage.warmup_steps=2: training has 1 steps"),
    ],
)
def test_what_cannot_be_compared_is_refused_by_name(tiny_work, tmp_path, changed, said):
    with pytest.raises(ConfigError) as refusal:
        learn(tiny_work, tmp_path, **changed)
    assert said in str(refusal.value)


@pytest.mark.heavy
def test_results_have_a_folder_before_anything_is_measured_and_equal_rows_are_named(tiny_work, tmp_path):
    (tmp_path / "curves").write_text("no folder")
    with pytest.raises(ConfigError, match=r"--curves=.*curves: .* cannot be made \(File exists\)"):
        learn(tiny_work, tmp_path, recipes=["same: stage.lr=1e-2"])
    assert "same has the same configuration as the first row" in (tmp_path / "table").read_text()


def test_the_schedule_of_nanochat():
    learner = object.__new__(NanochatLearner)
    learner.steps, learner.warm_up = 1000, 40
    found = [learner.rate(step) for step in (0, 39, 40, 350, 675, 999)]
    assert found == pytest.approx([1 / 40, 1, 1, 1, 0.525, 1 / 650 + 649 / 650 * 0.05])
    found = [learner.momentum(step) for step in (0, 200, 399, 400, 675, 1000)]
    assert found == pytest.approx([0.85, 0.91, 0.8497 + 0.12, 0.97 - 0.07 * 50 / 650, 0.935, 0.90], abs=5e-4)


NANOCHAT = """
{missing}
class GPT:
    def setup_optimizer(self, matrix_lr=0.02): ...
"""


def test_words_of_nanochat_are_known_or_refused(tmp_path, monkeypatch):
    for name, missing in (("whole", ""), ("other", ""), ("broken", "import no_such_module")):
        (tmp_path / name / "nanochat").mkdir(parents=True)
        (tmp_path / name / "nanochat" / "gpt.py").write_text(NANOCHAT.format(missing=missing))

    def peer(checkout, *words):
        monkeypatch.setattr(sys, "path", [*sys.path])
        return peer_recipe("nanochat high", [str(tmp_path / checkout), *words], [*SETTINGS])

    with pytest.raises(ConfigError, match=r"nanochat\.gpt of .*broken cannot be imported: .*no_such_module"):
        peer("broken")
    try:
        sys.modules.pop("nanochat", None)
        found = peer("whole", "matrix_lr=0.1", "warmup_steps=5", "model.d_ff=96")
        assert found.name == "nanochat high"
        assert found.config.model.d_ff == 96
        assert found.build.args[1] == {"matrix_lr": 0.1, "warmup_steps": 5}
        for word, said in (("matrix_lr", "expected KEY=NUMBER"), ("lr=1", "expected one of matrix_lr, warmup_steps")):
            with pytest.raises(ConfigError, match=f"--peer=nanochat high: {word}: {said}"):
                peer("whole", word)
        with pytest.raises(ConfigError, match="is loaded already: expected one checkout"):
            peer("other")
    finally:
        for name in ("nanochat.gpt", "nanochat"):
            sys.modules.pop(name, None)


@pytest.mark.heavy
def test_peers_of_one_kind_have_names_and_neox_its_own_initial_values():
    found = recipes_of(SETTINGS, [], ["neox: stage.lr=1", "neox high: model.init_std=0.3"])
    assert [one.name for one in found[1:]] == ["GPT-NeoX of transformers", "neox high"]
    assert [one.config.model.init_std for one in found] == [0.1, 0.02, 0.3]


def test_a_peer_learns_only_targets_that_count():
    class Peer(_Peer):
        grad_clip = 0.0

        def __init__(self):
            self.model = torch.nn.Embedding(8, 1)

        def token_losses(self, batch):
            return self.model(batch.targets_BT)[..., 0]

        def update(self, number):
            pass

    batches = [Batch.plain(torch.tensor([row])) for row in ([0, 1, 2, 3], [4, 5, 6, 7])]
    batches[0].loss_mask_BT[0, 1:] = 0
    peer = Peer()
    peer.step(0, batches)
    assert peer.model.weight.grad[:, 0].tolist() == pytest.approx([0, 0.2, 0, 0, 0.2, 0.2, 0.2, 0.2])


@pytest.mark.parametrize(
    "arguments",
    [("learn", "--widths", "64"), ("scaling", "--budget", "1s"), ("data", "--seeds", "1"), ("learn", "--quick")],
)
def test_options_of_other_benchmarks_are_refused(arguments):
    name, option, *_ = arguments
    with pytest.raises(ConfigError, match=f"bench {name} does not use {option}: expected settings or --json"):
        CliRunner().invoke(app, ["bench", *arguments], catch_exceptions=False)


def test_records_and_table_are_means_over_the_seeds():
    def curve(recipe, seed, bits):
        return Curve(recipe, seed, 2_500_000, 10, [Point(0, 0.0, 0.0, 9.0, 4.0), Point(10**6, 1e9, 30.0, 3.0, bits)])

    curves = [curve("a", 0, 2.0), curve("b <&", 0, 1.0), curve("a", 1, 2.2), curve("b <&", 1, 1.2)]
    first, second = records_of(curves)[:2]
    assert (first.case, first.unit, first.peer, first.rounds) == ("a", "bits/byte", None, 2)
    assert (first.value, second.value, second.ratio) == pytest.approx((2.1, 1.1, 1.1 / 2.1))
    console = Console(record=True, width=110, file=None, quiet=True)
    console.quiet = False
    with console.capture() as captured:
        console.print(table_of("T", curves))
    for text in ("2.50", "1.00", "30", "3.000", "2.100", "0.200", "0.524"):
        assert text in captured.get()
    with console.capture() as captured:
        console.print(table_of("T", curves[:2]))
    assert "0.000" not in captured.get()  # one seed has no range
    svg = drawing(curves)
    assert svg.count("<polyline") == 16
    assert "b &lt;&amp;" in svg
