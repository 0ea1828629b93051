"""Stage `generate`: every prompt once, in files that are the same bytes whether or not the run was disturbed."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from dist_lm import launch
from dist_lm.data.infill import InfillMarks
from dist_lm.errors import ArtefactError, ConfigError
from dist_lm.generation.request import Answer, Refusal, Request
from dist_lm.launcher import pool_run
from dist_lm.launcher.pool_run import run_pool_stage
from dist_lm.launcher.process import SIGNALS, Interrupt, watch_signals
from dist_lm.prepare.plan import Plan
from dist_lm.sandbox.pool import SandboxPool
from dist_lm.stages.generate.stage import STAGE
from dist_lm.stages.stage import Action
from dist_lm.storage.run_directory import WorkDirectory
from dist_lm.tokenizer.tokenizer import Tokenizer
from dist_lm.tracking.metrics import read_metrics
from tests.cluster.generation_runs import (
    BAD,
    AfterParts,
    Screen,
    overrides_of,
    parts_of,
    plan_of,
    write_prompts,
)
from tests.cluster.launched import assert_gone, finish, wait_until
from tests.cluster.pool_of_one import Alone
from tests.training_run import linked, unwritten

pytestmark = pytest.mark.cluster


@pytest.mark.heavy
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(trained, cluster, tmp_path):
    prompts = write_prompts(tmp_path / "p.jsonl", 200)
    clean = plan_of(trained, prompts, "run_id=clean", "stage.n=2", "seed=3", "stage.actors=1")
    assert clean.action is Action.BUILD
    assert "code/default/step_00000005" in clean.detail
    assert run_pool_stage(clean, cluster, Screen(), Interrupt())
    run = trained.run("generate", "clean")
    records = [json.loads(line) for text in parts_of(run).values() for line in text.decode().split("\n") if line]
    refused = {record["id"]: record["error"] for record in records if "error" in record}
    assert refused.keys() == {3, "long"}
    assert "p.jsonl line 4: not JSON" in refused[3]
    assert refused["long"].startswith("p.jsonl line 51: prompt has 801 tokens and model.max_seq_len is 256")
    assert refused["long"].endswith("or set truncate=left")
    (broken,) = [record for record in records if record["id"] == 3]
    assert broken["line"] == "{"
    assert "prompt" not in broken
    assert records[0]["extra"] == {"kind": "first"}
    answered = [record for record in records if "error" not in record]
    expected = [(f"p{i}", index) for i in range(200) if i not in BAD for index in range(2)]
    assert [(record["id"], record["index"]) for record in answered] == expected
    assert len({record["seed"] for record in answered}) == len(answered)
    for record in answered:
        assert len(record["tokens"]) == len(record["logprobs"]) == len(record["raw_logprobs"]) <= 12
        assert record["finish"] in ("eot", "length")
    result = json.loads(run.result.read_text())
    assert (result["prompts"], result["answers"], result["refused"]) == (200, 396, 2)
    assert result["first_refusal"] == refused[3]
    assert result["tokens"] == sum(len(record["tokens"]) for record in answered)

    same = ("stage.n=2", "seed=3", "stage.max_sequences=7")
    stopped = trained.run("generate", "stopped")
    began = plan_of(trained, prompts, "run_id=stopped", *same)
    assert not run_pool_stage(began, cluster, Screen(), AfterParts(stopped, 3))
    assert 3 <= len(parts_of(stopped)) < 10
    assert not stopped.result.exists()
    again = plan_of(trained, prompts, "run_id=stopped", *same)
    assert again.action is Action.RESUME
    (stopped.samples / ".part-00007.jsonl.0123456789abcdef.tmp").write_text("{")  # as a kill leaves it
    assert run_pool_stage(again, cluster, Screen(), Interrupt())
    assert parts_of(stopped) == parts_of(run)
    finished = json.loads(stopped.result.read_text())
    assert (finished["answers"], finished["first_refusal"]) == (396, refused[3])

    assert plan_of(trained, prompts, "run_id=stopped", *same).action is Action.READY
    before = prompts.read_bytes()
    write_prompts(prompts, 199)
    with pytest.raises(ArtefactError, match=r"not what .* began with: choose another run_id"):  # though it is done
        plan_of(trained, prompts, "run_id=stopped", *same)
    prompts.write_bytes(before)
    with pytest.raises(ConfigError, match=r"stage\.top_k=5 \(was 0\)"):
        plan_of(trained, prompts, "run_id=stopped", *same, "stage.top_k=5")
    with pytest.raises(ConfigError, match=r"parallel\.tp=2 \(was 1\)"):
        plan_of(trained, prompts, "run_id=stopped", *same, "parallel.tp=2")
    stopped.result.unlink()
    stopped.samples_part(2).unlink()
    write_prompts(prompts, 199)
    with pytest.raises(ArtefactError, match=r"not what .* began with: choose another run_id"):
        plan_of(trained, prompts, "run_id=stopped", *same)


@pytest.mark.heavy
def test_metrics_say_how_far_it_is_and_go_on_where_it_was_stopped(trained, cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(pool_run, "LINE_S", 0.0)
    prompts, run = write_prompts(tmp_path / "p.jsonl", 100), trained.run("generate", "measured")
    plan = plan_of(trained, prompts, "run_id=measured")
    assert not run_pool_stage(plan, cluster, Screen(), AfterParts(run, 2))
    seen = list(read_metrics(run.metrics))
    kept = [line for line in seen if line["step"] <= 20 * len(parts_of(run))]
    assert seen[-1]["generate/prompts"] == seen[-1]["step"] >= len(kept) > 0
    assert run_pool_stage(plan_of(trained, prompts, "run_id=measured"), cluster, Screen(), Interrupt())
    lines = list(read_metrics(run.metrics))
    steps = [line["step"] for line in lines]
    assert steps == sorted(set(steps))
    assert lines[: len(kept)] == kept
    assert unwritten(run, "generate") == set()
    result = json.loads(run.result.read_text())
    for name in ("prompts", "answers", "refused", "tokens"):
        assert lines[-1][f"generate/{name}"] == result[name]
    assert lines[-1]["generate/eta_s"] == 0
    assert lines[-1]["generate/new_tokens_mean"] == result["tokens"] / result["answers"]


class SlowStart(Alone):
    """A pool whose engines take 100 s to start, and whose answers all come one second later."""

    now = 0.0

    @classmethod
    def start(cls, *arguments, **options) -> "SlowStart":
        SlowStart.now += 100
        return super().start(*arguments, **options)  # type: ignore[return-value]

    def generate(self, requests: Iterable[Request]) -> Iterator[Answer | Refusal]:
        results = list(super().generate(requests))
        SlowStart.now += 1
        yield from results


def test_speed_does_not_count_the_start_of_engines(trained, cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(pool_run, "Pool", SlowStart)
    monkeypatch.setattr(pool_run, "time", SimpleNamespace(monotonic=lambda: SlowStart.now))
    plan = plan_of(trained, write_prompts(tmp_path / "p.jsonl", 3), "run_id=timed")
    assert run_pool_stage(plan, cluster, Screen(), Interrupt())
    result = json.loads(trained.run("generate", "timed").result.read_text())
    assert result["seconds"] == 1.0
    assert result["tokens_per_s"] == result["tokens"] > 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
@pytest.mark.parametrize(
    "slow", ["launcher.pool_run.model_weights", "stages.generate.parts.Samples", "generation.load.stage_tokenizer"]
)
def test_a_signal_before_engines_start_is_obeyed_at_once(trained, cluster, tmp_path, monkeypatch, number, slow):
    before = [signal.getsignal(one) for one in SIGNALS]

    def read(*arguments: object) -> None:
        signal.raise_signal(number)
        pytest.fail(f"{slow} went on after the signal")

    plan = plan_of(trained, write_prompts(tmp_path / "p.jsonl", 3), f"run_id=stopped_{number:d}_{slow}")
    monkeypatch.setattr(f"dist_lm.{slow}", read)
    with watch_signals(Screen(), "stopping") as interrupt:
        noted = [signal.getsignal(one) for one in SIGNALS]
        assert not run_pool_stage(plan, cluster, Screen(), interrupt)
        assert interrupt.number == number
        assert [signal.getsignal(one) for one in SIGNALS] == noted
    assert [signal.getsignal(one) for one in SIGNALS] == before
    monkeypatch.undo()


def test_nothing_answered_is_an_error_and_stays_one(trained, cluster, tmp_path, monkeypatch):
    (tmp_path / "p.jsonl").write_text("{\n" * 3)
    plan = Plan((plan_of(trained, tmp_path / "p.jsonl", "run_id=none"),))
    assert run_pool_stage(plan.stages[0], cluster, Screen(), Interrupt())
    monkeypatch.setattr(launch, "run_missing", lambda *arguments: 0)
    for _ in range(2):
        screen = Screen()
        assert launch.carry_out(plan, screen) == 2
        assert "no prompt was answered, 3 refused: p.jsonl line 1: not JSON" in screen.errors.getvalue()
        assert "0 to 3 prompts, 3 refused: p.jsonl line 1: not JSON" in screen.output.getvalue()
        assert "(1 file)" in screen.output.getvalue()
    (pipeline,) = (trained.path / "pipelines").glob("generate-none.json")
    assert json.loads(pipeline.read_text())["state"] == "failed"


def test_a_prompt_with_a_suffix_asks_for_the_middle(trained, cluster, tmp_path):
    asked = [
        {"prompt": "def a(", "suffix": "return b", "note": 1},
        {"prompt": "", "suffix": ""},
        {"prompt": "x " * 100, "suffix": "y " * 100},
        {"prompt": "def a(", "suffix": None},
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(one) + "\n" for one in asked))
    plan = plan_of(trained, tmp_path / "p.jsonl", "run_id=middles", "stage.truncate=left")
    looked, tokenizer = trained.run("generate", "looked"), Tokenizer.load(trained.tokenizer_model)
    looked.path.mkdir(parents=True)
    work = STAGE.work(plan.config, looked, tokenizer, SandboxPool)
    eot, marks = tokenizer.eot_id, InfillMarks.of(tokenizer)
    before, after = tokenizer.encode("def a("), tokenizer.encode("return b")
    assert [request.prompt for request in work.requests()] == [
        [eot, marks.prefix, *before, marks.suffix, *after, marks.middle],
        [eot, marks.prefix, marks.suffix, marks.middle],
        [eot, *before],
    ]
    assert run_pool_stage(plan, cluster, Screen(), Interrupt())
    (part,) = parts_of(trained.run("generate", "middles")).values()
    records = [json.loads(line) for line in part.splitlines()]
    assert [record.get("suffix") for record in records] == ["return b", "", "y " * 100, None]
    assert records[0]["extra"] == {"note": 1}
    assert [bool(record.get("tokens")) for record in records] == [True, True, False, True]
    assert "p.jsonl line 3: prompt and suffix have 404 tokens and model.max_seq_len is 256" in records[2]["error"]


def test_a_long_prompt_keeps_the_tokens_that_a_model_always_sees(trained, tmp_path):
    (tmp_path / "p.txt").write_text("x " * 400 + "\n")
    run, tokenizer = trained.run("generate", "looked_cut"), Tokenizer.load(trained.tokenizer_model)
    run.create()
    tokenizer.first_token = replace(tokenizer.first_token, id=7)
    plan = plan_of(trained, tmp_path / "p.txt", "run_id=cut", "stage.truncate=left")
    (request,) = STAGE.work(plan.config, run, tokenizer, SandboxPool).requests()
    kept = 256 - plan.config.stage.max_new_tokens
    assert request.prompt == [7, *tokenizer.encode("x " * 400)[-(kept - 1) :]]
    chat = plan_of(trained, tmp_path / "p.txt", "run_id=cut", "stage.truncate=left", "stage.chat=true")
    assert list(STAGE.work(chat.config, run, tokenizer, SandboxPool).requests()) == []
    (part,) = parts_of(run).values()
    assert "p.txt line 1: the prompt in its turn has" in json.loads(part)["error"]


def test_an_empty_prompt_is_answered(trained, cluster, tmp_path):
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": ""}) + "\n")
    assert run_pool_stage(plan_of(trained, tmp_path / "p.jsonl", "run_id=empty"), cluster, Screen(), Interrupt())
    (part,) = parts_of(trained.run("generate", "empty")).values()
    record = json.loads(part)
    assert (record["prompt"], record["id"], len(record["tokens"]) > 0) == ("", 0, True)


def test_the_plan_says_how_tokens_are_chosen(trained, tmp_path):
    prompts = write_prompts(tmp_path / "p.jsonl", 2)
    detail = plan_of(trained, prompts).detail
    assert detail.endswith(", temperature=1 top_k=0 top_p=1 max_new_tokens=12 n=1")
    detail = plan_of(trained, prompts, "stage.min_p=0.1", "stage.stop=[ab]", "stage.temperature=0.7").detail
    assert detail.endswith(", temperature=0.7 top_k=0 top_p=1 max_new_tokens=12 n=1 min_p=0.1 stop=['ab']")


@pytest.mark.heavy
def test_the_checkpoint_is_the_newest_code_or_language_one_and_stays(trained, cluster, tmp_path):
    prompts = write_prompts(tmp_path / "p.jsonl", 2)
    work = linked(trained, tmp_path / "work")
    with pytest.raises(ArtefactError, match=r"no checkpoint of stage code or language.*stage=code"):
        plan_of(work, prompts)
    (work.path / "runs").mkdir()
    (work.path / "runs" / "language").symlink_to(trained.path / "runs" / "language")
    begun = plan_of(work, prompts, "run_id=begun")
    assert not run_pool_stage(begun, cluster, Screen(), AfterParts(work.run("generate", "begun"), 0))
    (work.path / "runs" / "code").symlink_to(trained.path / "runs" / "code")
    assert "code/default" in plan_of(work, prompts).detail
    assert "language/default" in plan_of(work, prompts, "run_id=begun").detail
    given = plan_of(work, prompts, f"stage.checkpoint={trained.path}/runs/language/default")
    assert "language/default/step_00000005" in given.detail
    with pytest.raises(ArtefactError, match=r"another model: model\.d_ff=120.*use the same model$"):
        plan_of(work, prompts, "model.d_ff=120")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("stage.top_p=0", r"stage\.top_p=0.0: expected in \(0, 1\]"),
        ("stage.temperature=-1", r"stage\.temperature=-1.0: expected a number >= 0"),
        ("stage.page_tokens=7", r"stage\.page_tokens=7: expected a multiple"),
        ("stage.n=0", r"stage\.n=0: expected a positive integer"),
        ("stage.actors=0", r"stage\.actors=0"),
        ("stage.truncate=right", r"stage\.truncate=right: expected refuse or left"),
        ("stage.max_new_token=4", r"did you mean stage\.max_new_tokens\?"),
        ("stage.steps=4", r"stage\.steps=4: no such key"),
        ("stage.top_k=many", r"stage\.top_k=many: expected an integer"),
        ("parallel.tp=6", r"parallel\.tp=6: expected a degree.*more than model\.n_heads"),
        ("stage.stop_tokens=[4,640]", r"stage\.stop_tokens=\[4, 640\]: expected tokens from 0 to 639"),
        ("stage.logit_bias={-1: 2.0}", r"stage\.logit_bias=\{-1: 2\.0\}: expected tokens from 0 to 639"),
        (
            "stage.max_new_tokens=100; stage.cache_tokens=100",
            r"stage\.cache_tokens=100: expected .* 101 tokens",
        ),
        ("stage.stop=['']", r"stage\.stop=\[''\]: expected texts that are not empty"),
        ("stage.prompts=nowhere.txt", r"stage\.prompts=nowhere\.txt: no such file"),
    ],
)
def test_a_bad_value_is_refused_by_the_name_of_its_key(trained, tmp_path, override, words):
    with pytest.raises(ConfigError, match=words):
        plan_of(trained, write_prompts(tmp_path / "p.jsonl", 2), *override.split("; "))


def start(work: WorkDirectory, prompts: Path, *overrides: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "dist_lm.launch", *overrides_of(work, prompts, *overrides)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def actors_of(process: subprocess.Popen) -> list[psutil.Process]:
    """Ray's processes for the engines of a launcher, also those on their way."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            found += [child] if any("PoolActor" in word for word in child.cmdline()) else []
    return found


@pytest.mark.bars
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.bars)])
def test_a_signal_while_engines_start_does_not_wait_for_them(trained, tmp_path, number):
    prompts = write_prompts(tmp_path / "p.jsonl", 100)
    process = start(trained, prompts, f"run_id=starting_{number:d}")
    wait_until(lambda: actors_of(process), process, "an engine on its way")
    for actor in actors_of(process):
        actor.suspend()  # it never gets ready
    family = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, number)
    code, out, err = finish(process)
    assert (code, "the same command continues" in out) == (128 + number, True), err
    assert_gone(family)


@pytest.mark.bars  # test_sharded.py compares its tokens
def test_several_processes_can_share_the_model_of_an_engine(trained, tmp_path):
    prompts = write_prompts(tmp_path / "p.jsonl", 60)
    said = {}
    for tp in (1, 2):
        code, _, err = finish(start(trained, prompts, f"run_id=tp_{tp}", f"parallel.tp={tp}"))
        assert code == 0, err
        parts = parts_of(trained.run("generate", f"tp_{tp}"))
        records = [json.loads(line) for text in parts.values() for line in text.decode().split("\n") if line]
        said[tp] = [(record["id"], record.get("tokens"), record.get("error")) for record in records]
    assert said[1] == said[2]


@pytest.mark.parametrize(
    ("count", "new_tokens"),
    [
        pytest.param(500, 24, marks=pytest.mark.heavy),
        pytest.param(3_000, 24, marks=pytest.mark.bars),
        pytest.param(10_000, 4, marks=pytest.mark.bars),
    ],
)
def test_thousands_of_prompts_through_kills_and_signals(trained, tmp_path, count, new_tokens):
    prompts = write_prompts(tmp_path / "p.jsonl", count)
    large = (f"stage.prompts_per_shard={count // 20}", f"stage.max_new_tokens={new_tokens}")
    code, out, err = finish(start(trained, prompts, f"run_id=all_{count}", *large))
    assert code == 0, err
    assert f"{count - 2:,} to {count:,} prompts, 2 refused" in out
    run = trained.run("generate", f"through_{count}")
    for number, parts in ((signal.SIGKILL, 3), (signal.SIGUSR1, 6), (signal.SIGTERM, 9)):
        # At least one part is of this attempt: a signal before its handler is there ends the launcher at once.
        wanted = max(parts, len(list(run.samples.glob("part-*"))) + 1)
        process = start(trained, prompts, f"run_id={run.path.name}", *large)
        wait_until(lambda wanted=wanted: len(list(run.samples.glob("part-*"))) >= wanted, process, f"{wanted} files")
        family = psutil.Process(process.pid).children(recursive=True)
        os.kill(process.pid, number)
        code, out, err = finish(process)
        assert code == (-number if number == signal.SIGKILL else 128 + number), err
        assert number == signal.SIGKILL or "the same command continues" in out
        assert_gone(family)
    code, _, err = finish(start(trained, prompts, f"run_id={run.path.name}", *large))
    assert code == 0, err
    assert parts_of(run) == parts_of(trained.run("generate", f"all_{count}"))
    assert len(parts_of(run)) == 20
    code, out, _ = finish(start(trained, prompts, f"run_id={run.path.name}", *large))
    assert (code, "there" in out) == (0, True)
