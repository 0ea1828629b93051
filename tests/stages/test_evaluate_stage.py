"""Stage `evaluate`: figures of several models, the same whether or not the run was disturbed; refusals by name."""

import json
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator

import pytest

from dist_lm.cluster.events import PoolFailure
from dist_lm.cluster.ray_cluster import RayCluster
from dist_lm.config.cluster import ClusterConfig
from dist_lm.errors import ArtefactError, ConfigError
from dist_lm.evaluation import tasks
from dist_lm.evaluation.comparison import rows_of
from dist_lm.evaluation.figures import bits_figures, task_figures
from dist_lm.evaluation.problems import own_infills, own_problems
from dist_lm.evaluation.statistics import pass_at_k
from dist_lm.generation.request import Answer, Request
from dist_lm.launcher import pool_run
from dist_lm.launcher.pool_run import run_pool_stage
from dist_lm.launcher.process import Interrupt
from dist_lm.prepare.compose import compose_config
from dist_lm.prepare.plan import make_plan
from dist_lm.sandbox.pool import SandboxPool
from dist_lm.stages.evaluate.stage import STAGE
from dist_lm.stages.evaluate.work import Evaluation
from dist_lm.stages.stage import Action
from dist_lm.storage.run_directory import RunDirectory, WorkDirectory
from dist_lm.tokenizer.tokenizer import Tokenizer
from dist_lm.training import checkpoint_files
from tests.cluster.generation_runs import Screen
from tests.cluster.pool_of_one import Alone, Meanwhile
from tests.conftest import TINY_MODEL
from tests.training_run import linked, write_untrained

SETTINGS = (*TINY_MODEL, "stage=evaluate", "stage.max_new_tokens=8")


@pytest.fixture(scope="module")
def trained(tiny_work: WorkDirectory, tmp_path_factory: pytest.TempPathFactory) -> WorkDirectory:
    work = linked(tiny_work, tmp_path_factory.mktemp("evaluated") / "work")
    for seed, stage in enumerate(("language", "code", "tools", "reward")):
        write_untrained(work, stage, seed)
    return work


def plan_of(work: WorkDirectory, *overrides: str):
    words = [*SETTINGS, f"work_dir={work.path}", *overrides]
    (planned,) = make_plan("evaluate", lambda _: compose_config(words)).stages
    return planned


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> RayCluster:
    """Engines work in this process."""
    monkeypatch.setattr(pool_run, "Pool", Alone)
    monkeypatch.setattr(RayCluster, "nodes", lambda self: [])
    return RayCluster("nowhere", ClusterConfig(name="local"))


class AfterFiles(Interrupt):
    """Asks to stop once there are some files."""

    def __init__(self, run: RunDirectory, files: int) -> None:
        super().__init__()
        self._enough = lambda: len(list(run.samples.glob("*/*.jsonl"))) >= files

    @property
    def requested(self) -> bool:
        return self._enough()


def files_of(run: RunDirectory) -> dict[str, list[dict]]:
    found = {}
    for path in sorted(run.samples.glob("*/*.jsonl")):
        records = [json.loads(line) for line in path.read_bytes().splitlines()]
        found[f"{path.parent.name}/{path.name}"] = records
    return found


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only some of the problems and questions."""
    monkeypatch.setattr(tasks, "own_problems", lambda language: own_problems(language)[::12])
    monkeypatch.setattr(tasks, "own_infills", lambda: own_infills()[::6])
    monkeypatch.setattr(tasks, "QUESTIONS", 2)
    monkeypatch.setattr(tasks, "TURN_TOKENS", 8)


@pytest.mark.heavy
@pytest.mark.usefixtures("few")
def test_two_models_give_the_same_figures_after_a_stop(trained, cluster, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"def f_{i}(x):"}) + "\n" for i in range(5)))
    models = ",".join(str(trained.run(stage, "default").path) for stage in ("code", "language"))
    settings = (
        f"stage.models=[{models}]",
        "stage.tasks=[own_python,own_bash,own_sql,infill,tools,bits_per_byte,reward]",
        *(f"eval.prompts={prompts}", f"eval.reward_model={trained.run('reward', 'default').path}"),
        *("stage.n=2", "stage.k=[1,2]", "stage.temperature=1", "stage.questions_per_part=2", "stage.documents=5"),
    )
    clean = plan_of(trained, "run_id=clean", *settings)
    assert clean.action is Action.BUILD
    assert run_pool_stage(clean, cluster, Screen(), Interrupt())
    run, stopped = (trained.run("evaluate", name) for name in ("clean", "stopped"))
    assert not run_pool_stage(plan_of(trained, "run_id=stopped", *settings), cluster, Screen(), AfterFiles(stopped, 4))
    assert 4 <= len(files_of(stopped)) < len(files_of(run))
    again = plan_of(trained, "run_id=stopped", *settings, "stage.max_sequences=5")
    assert again.action is Action.RESUME
    assert run_pool_stage(again, cluster, Screen(), Interrupt())
    assert files_of(stopped) == files_of(run)
    assert (stopped.samples / "table.jsonl").read_bytes() == (run.samples / "table.jsonl").read_bytes()
    result, other = (json.loads(one.result.read_text()) for one in (run, stopped))
    assert (result["models"], result["comparisons"]) == (other["models"], other["comparisons"])
    assert [one["model"] for one in result["models"]] == [f"{s}/default/step_00000005" for s in ("code", "language")]
    first = result["models"][0]["tasks"]
    assert first["own_sql"]["figures"].keys() == {"pass@1", "pass@2"}
    assert first["own_sql"]["tests"] == first["infill"]["tests"] == {"version": 2, "seed": 0}
    assert "tests" not in first["tools"]
    assert json.loads(run.inputs.read_text())["eval.tests"] == "2"
    assert len(first["own_sql"]["ids"]) == 5
    assert sum(first["own_sql"]["outcomes"].values()) == 10
    assert 0 < first["bits_per_byte"]["figures"]["bits_per_byte"]["value"] < 30
    sources = first["bits_per_byte"]["figures"].keys()
    assert {"bits_per_byte, code sql", "bits_per_byte, language english"} <= sources
    compared = {one["task"] for one in result["comparisons"]}
    assert compared == {"own_python", "own_bash", "own_sql", "infill", "tools", "bits_per_byte", "reward"}
    (reward,) = [one for one in result["comparisons"] if one["task"] == "reward"]
    values = [model["tasks"]["reward"]["values"] for model in result["models"]]
    assert len(values[0]) == 5
    assert reward["wins"]["value"] == sum((b > a) + (a == b) / 2 for a, b in zip(*values, strict=True)) / 5
    screen = Screen()
    STAGE.summarize(again.config, screen)
    assert "own_bash: language/default" in screen.output.getvalue()

    assert plan_of(trained, "run_id=stopped", *settings).action is Action.READY
    with pytest.raises(ConfigError, match=r"stage\.temperature=0\.5 \(was 1\.0\)"):
        plan_of(trained, "run_id=stopped", *settings, "stage.temperature=0.5")


@pytest.mark.heavy
@pytest.mark.usefixtures("few")
def test_figures_of_files_that_have_changed_since_are_not_shown_or_gone_on_with(tiny_work, cluster, tmp_path):
    work = linked(tiny_work, tmp_path / "work")
    model = write_untrained(work, "code", 0).path
    problem = {"task_id": "a", "prompt": "def f():\n", "entry_point": "f", "canonical_solution": "    return 1\n"}
    problem |= {"test": "def check(f):\n    assert f() == 1\n"}
    file = tmp_path / "mine.jsonl"
    file.write_text(json.dumps(problem) + "\n")
    asked = ("stage.tasks=[humaneval]", f"eval.humaneval={file}")
    other = write_untrained(work, "language", 0).path
    both = plan_of(work, *asked, f"stage.models=[{model},{other}]", "run_id=both")
    with pytest.raises(ArtefactError, match=rf"^eval\.humaneval={file}: has changed since "):
        run_pool_stage(both, cluster, Screen(), Meanwhile(lambda: file.write_text(json.dumps(problem) + "\n\n")))
    assert len(files_of(work.run("evaluate", "both"))) == 1  # of the first model
    file.write_text(json.dumps(problem) + "\n")
    settings = (f"stage.models=[{model}]", *asked)
    assert run_pool_stage(plan_of(work, *settings), cluster, Screen(), Interrupt())
    assert plan_of(work, *settings).action is Action.READY
    file.write_text(json.dumps(problem | {"test": "def check(f):\n    assert f() == 2\n"}) + "\n")
    with pytest.raises(ArtefactError, match=rf"^eval\.humaneval={file}: has changed since .*: choose another run_id$"):
        plan_of(work, *settings)
    file.write_text(json.dumps(problem) + "\n")
    assert plan_of(work, *settings).action is Action.READY
    other = shutil.copy(file, tmp_path / "other.jsonl")
    with pytest.raises(ConfigError, match=rf"eval\.humaneval={other} \(was {file}\)"):
        plan_of(work, *settings, f"eval.humaneval={other}")
    with pytest.raises(ConfigError, match=r"stage\.questions_per_part=3 \(was "):  # files hold so many each
        plan_of(work, *settings, "stage.questions_per_part=3")
    assert plan_of(work, *settings, "eval.pool.tp=2").action is Action.READY
    shutil.rmtree(model)
    write_untrained(work, "code", 1)
    with pytest.raises(ArtefactError, match=r"^stage\.models=.*step_00000005: has changed since "):
        plan_of(work, *settings)


@pytest.mark.heavy
def test_a_corpus_that_was_built_again_from_other_text_is_another_input(tiny_work, cluster, tmp_path):
    work = linked(tiny_work, tmp_path / "work")
    (work.path / "corpora").unlink()
    shutil.copytree(tiny_work.path / "corpora", work.path / "corpora")
    settings = (two_models(work), "stage.tasks=[tools,bits_per_byte]", "stage.corpora=[code]", "stage.documents=2")
    assert run_pool_stage(plan_of(work, *settings), cluster, Screen(), Interrupt())
    assert json.loads(work.run("evaluate", "default").inputs.read_text()).keys() > {"corpus code", "corpus tools"}
    aside, other = tmp_path / "aside", work.corpus("language")
    for name in ("code", "tools"):
        work.corpus(name).rename(aside)
        assert plan_of(work, *settings).action is Action.READY  # the figures of a finished run stay
        shutil.copytree(other, work.corpus(name))
        with pytest.raises(ArtefactError, match=rf"^corpus {name}: has changed since .*: choose another run_id$"):
            plan_of(work, *settings)
        shutil.rmtree(work.corpus(name))
        aside.rename(work.corpus(name))
    assert plan_of(work, *settings).action is Action.READY


def two_models(work: WorkDirectory) -> str:
    return f"stage.models=[{','.join(str(write_untrained(work, one, 0).path) for one in ('code', 'language'))}]"


@pytest.mark.heavy
def test_models_of_a_run_are_asked_the_same_questions(tiny_work, cluster, tmp_path):
    work = linked(tiny_work, tmp_path / "work")
    prompts, reward = tmp_path / "a.txt", write_untrained(work, "reward", 0)
    prompts.write_text("def f():\n")
    settings = (two_models(work), "stage.tasks=[reward]", f"eval.reward_model={reward.path}")

    def refused(run_id: str, glob: str, change: Callable[[], object]) -> str:
        planned = plan_of(work, *settings, f"eval.prompts={tmp_path}/{glob}", f"run_id={run_id}")
        with pytest.raises(ArtefactError, match=r"has changed since .*: choose another run_id") as error:
            run_pool_stage(planned, cluster, Screen(), Meanwhile(change))
        return str(error.value).partition(": ")[0]

    assert refused("edited", "a.txt", lambda: prompts.write_text("def g():\n")) == f"eval.prompts={prompts}"
    more = tmp_path / "b.txt"
    assert refused("more", "*.txt", lambda: more.write_text("def h():\n")) == f"eval.prompts={more}"
    assert refused("fewer", "*.txt", more.unlink) == f"eval.prompts={more}"
    scoring = reward.checkpoints / "step_00000005"
    manifest = scoring / checkpoint_files.MANIFEST
    changed = refused("rewritten", "a.txt", lambda: manifest.write_text(manifest.read_text() + " "))
    assert changed == f"eval.reward_model={scoring}"
    assert files_of(work.run("evaluate", "rewritten")).keys() == {"code_default_step_00000005/reward-000.jsonl"}


@pytest.mark.heavy
def test_a_reward_run_that_trains_on_scores_all_models_with_one_checkpoint(tiny_work, cluster, tmp_path):
    work, elsewhere = linked(tiny_work, tmp_path / "work"), linked(tiny_work, tmp_path / "elsewhere")
    reward, other = write_untrained(work, "reward", 0), write_untrained(elsewhere, "reward", 1)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("def f():\ndef g():\n")
    asked = (two_models(work), "stage.tasks=[reward]", f"eval.prompts={prompts}")
    settings = (*asked, f"eval.reward_model={reward.path}")
    assert run_pool_stage(plan_of(work, *settings, "run_id=clean"), cluster, Screen(), Interrupt())

    def train_on() -> None:
        newer = shutil.copytree(other.checkpoints / "step_00000005", reward.checkpoints / "step_00000006")
        checkpoint_files.write_pointer(reward.checkpoints, checkpoint_files.LATEST, newer)

    assert run_pool_stage(plan_of(work, *settings, "run_id=meanwhile"), cluster, Screen(), Meanwhile(train_on))
    clean, meanwhile = (json.loads(work.run("evaluate", name).result.read_text()) for name in ("clean", "meanwhile"))
    assert clean["models"] == meanwhile["models"]
    newer, before = (f"{reward.checkpoints}/step_0000000{step}" for step in (6, 5))
    with pytest.raises(ConfigError, match=rf"eval\.reward_model={newer} \(was {before}\)"):
        plan_of(work, *settings, "run_id=clean")
    assert plan_of(work, *asked, f"eval.reward_model={before}", "run_id=clean").action is Action.READY
    manifest = reward.checkpoints / "step_00000005" / checkpoint_files.MANIFEST
    manifest.write_text(manifest.read_text() + " ")
    with pytest.raises(ArtefactError, match=rf"^eval\.reward_model={before}: has changed since "):
        plan_of(work, *asked, f"eval.reward_model={before}", "run_id=clean")


@pytest.mark.usefixtures("few")
def test_sandboxes_end_with_a_run_that_fails(trained, cluster, monkeypatch):
    def fails(self: Alone, requests: Iterable[Request]) -> Iterator[Answer]:
        first, *_ = requests
        yield answer(first, 0, "    sleep 0")
        assert sandbox_threads()
        raise PoolFailure("engines keep dying")

    def sandbox_threads() -> list[str]:
        return [one.name for one in threading.enumerate() if one.name.startswith("sandbox")]

    monkeypatch.setattr(Alone, "generate", fails)
    with pytest.raises(PoolFailure):
        run_pool_stage(plan_of(trained, "stage.tasks=[own_bash]", "run_id=fails"), cluster, Screen(), Interrupt())
    assert sandbox_threads() == []


@pytest.fixture
def evaluation(trained: WorkDirectory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Evaluation]]:
    """Opens the work for the code model; what is executed passes if it is the reference solution."""
    opened = []

    def open_(*overrides: str) -> Evaluation:
        planned = plan_of(trained, *overrides)
        run = trained.run("evaluate", planned.config.run_id)
        run.samples.mkdir(parents=True, exist_ok=True)
        (config,) = STAGE.rounds(planned.config)
        opened.append(Evaluation(config, run, Tokenizer.load(trained.tokenizer_model), SandboxPool))
        return opened[-1]

    yield open_
    for one in opened:
        one.close()


def answer(request: Request, index: int, text: str) -> Answer:
    return Answer(request.id, index, len(request.prompt), (1, 2), text, (0.0,), (0.0,), "stop", request.seed, 0)


@pytest.mark.heavy
def test_reference_solutions_pass_and_seeds_belong_to_task_and_question(evaluation):
    settings = ("stage.tasks=[own_sql]", "stage.n=4", "stage.k=[1,3]", "stage.temperature=1")
    work = evaluation("run_id=references", *settings)
    requests = list(work.requests())
    assert len({request.seed for request in requests}) == len(requests) == 50
    other = evaluation("run_id=others", "stage.tasks=[own_bash,own_sql]", *settings[1:])
    assert [request.seed for request in other.requests()][50:] == [request.seed for request in requests]
    for number, (request, problem) in enumerate(zip(requests, own_problems("sql"), strict=True)):
        for index in range(4):
            right = index <= number % 4
            work.take(answer(request, index, problem.solution.rstrip(";\n") if right else " 1"))
    work.finish(lambda: True)
    assert work.is_done
    found = work.result()["tasks"]["own_sql"]
    shares = [(number % 4 + 1) / 4 for number in range(50)]
    assert found["values"] == pytest.approx(shares)
    assert found["figures"]["pass@1"]["value"] == pytest.approx(sum(shares) / 50)
    expected = sum(pass_at_k(4, number % 4 + 1, 3) for number in range(50)) / 50
    assert found["figures"]["pass@3"]["value"] == pytest.approx(expected)
    assert found["groups"]["level 1"][2] == 15
    assert found["outcomes"].keys() == {"passed", "failed"}


def test_a_model_of_conversations_is_asked_and_its_block_of_code_runs(evaluation, trained):
    work = evaluation(f"stage.models=[{trained.run('tools', 'default').path}]", "stage.tasks=[own_bash]", "run_id=chat")
    assert work.chat
    (first, *_) = requests = list(work.requests())
    text = Tokenizer.load(trained.tokenizer_model).decode(first.prompt)
    assert "Complete this Bash program." in text
    assert first.params.stop == ()
    assert len(first.params.stop_tokens) == 1
    for request, problem in zip(requests, own_problems("bash"), strict=True):
        work.take(answer(request, 0, f"Here:\n```bash\n{problem.prompt}{problem.solution}```\n"))
    work.finish(lambda: True)
    assert work.result()["tasks"]["own_bash"]["figures"]["pass@1"]["value"] == 1


def test_corpora_that_cannot_be_measured_are_refused_before_a_question_is_asked(evaluation):
    for corpora, message in (("language,cdoe", "no cdoe in"), ("tools", "no held-out text, only conversations")):
        with pytest.raises(ArtefactError, match=rf"^stage\.corpora=\[{corpora}\]: {message}"):
            evaluation("stage.tasks=[own_sql,bits_per_byte]", f"stage.corpora=[{corpora}]", "run_id=corpora")


def test_figures_of_records():
    records = [
        {"id": "a", "group": "g", "passed": True, "outcome": "passed"},
        {"id": "a", "group": "g", "passed": False, "outcome": "failed"},
        {"id": "b", "group": "", "passed": False, "outcome": "refused"},
    ]
    found = task_figures(records, [1, 2])
    assert [found["figures"][name]["value"] for name in ("pass@1", "pass@2")] == [0.25, 0.5]
    assert found["groups"] == {"g": ("pass@1", 0.5, 1)}
    assert found["outcomes"] == {"failed": 1, "passed": 1, "refused": 1}
    documents = [{"id": "x", "group": "s", "bits": 8.0, "bytes": 4}, {"id": "y", "group": "t", "bits": 1.0, "bytes": 1}]
    bits = bits_figures(documents)
    assert bits["figures"]["bits_per_byte"]["value"] == pytest.approx(9 / 5)
    assert bits["figures"]["bits_per_byte, s"]["value"] == 2
    assert rows_of({"model": "m", "tasks": {"t": found}})[-1]["figure"] == "pass@1, g"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stage.tasks=[own_rust]", r"stage\.tasks=.*own_rust.*own_python"),
        ("stage.tasks=[humaneval]", r"eval\.humaneval=: expected the file of the task"),
        ("stage.tasks=[reward]", r"eval\.prompts=: expected a file"),
        ("stage.n=3", r"stage\.n=3: expected 1 with stage\.temperature=0"),
        ("stage.k=[2]", r"stage\.k=\[2\]: expected numbers up to stage\.n=1"),
        ("stage.chat=maybe", r"stage\.chat=maybe"),
        ("sandbox=off", r"sandbox=off: expected strict or trust_me"),
    ],
)
def test_settings_that_cannot_run_are_refused_by_name(override, message, trained):
    with pytest.raises(ConfigError, match=message):
        plan_of(trained, override)


def test_without_a_sandbox_nothing_starts(trained, monkeypatch):
    from dist_lm.sandbox import sandbox

    def none_here(trust_me: bool) -> None:
        raise sandbox.SandboxError("no sandbox for untrusted code on this machine")

    monkeypatch.setattr(tasks, "fences", none_here)
    with pytest.raises(ConfigError, match="no sandbox"):
        plan_of(trained)
    assert plan_of(trained, "stage.tasks=[bits_per_byte]").action is Action.BUILD


def test_without_a_checkpoint_the_error_names_a_key_of_this_stage(tiny_work, tmp_path):
    with pytest.raises(ArtefactError, match=r"^stage\.models=auto: no checkpoint.*or give stage\.models=\[PATH\]$"):
        plan_of(linked(tiny_work, tmp_path / "work"))
