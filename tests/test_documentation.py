"""README and docs/*.md: each shell line can be typed, named files, keys and links exist, snippets of Python run.

Shell lines are those of code blocks and of code spans in the text. Nothing is started: launcher lines are composed, and
verbs and their options parsed, scripts and modules looked up. Words in capitals (RUN, PATH, NODES) stand for a value.
"""

import importlib
import importlib.util
import pkgutil
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer.main

from dist_lm.__main__ import app
from dist_lm.bench.case import benchmark_at
from dist_lm.bench.learn_recipes import recipes_of
from dist_lm.bench.run import BENCHMARKS
from dist_lm.bench.scaling import numbers_of
from dist_lm.config.root import Config, save_config
from dist_lm.generation.request import Answer
from dist_lm.gpu_check import results
from dist_lm.launch import check_stage_prefixes, ranks_planned
from dist_lm.model.size import parameter_shapes
from dist_lm.parallel.layout import Layout
from dist_lm.parallel.rendezvous import connections_of
from dist_lm.prepare.compose import choices, compose_config, overrides_of, target_stage
from dist_lm.prepare.layout import with_layout
from dist_lm.prepare.plan import may_need, with_command_file
from dist_lm.stages.registry import stage_named
from dist_lm.stages.training.stage import TrainingStage
from dist_lm.storage.run_directory import RunDirectory
from dist_lm.tracking.metrics_page import page as metrics_page
from tests.conftest import TINY
from tests.training_run import linked, write_untrained

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = (ROOT / "README.md", *sorted(DOCS.glob("*.md")))
FOLDERS = ("dist_lm/", "conf/", "launch/", "slurm/", "tests/", "docs/", ".ci/")

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SPAN = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
ANSI_C_QUOTES = re.compile(r"\$'((?:[^'\\]|\\.)*)'")
BEGINNINGS = ("python", "dist-lm", "dist-lm-launch", "bash", "sbatch", "torchrun", "pytest", "pip", ".venv/bin/")
PLACEHOLDERS = {"S": "code", "STAGE": "code", "MODEL": "nano", "NODES": "2", "N": "2", "$HOME": "/home/me"}
GENERIC = ("...", "VERB", "key=value", "group=choice", "KEY=value", "NAME.KEY=value")


class Line(NamedTuple):
    page: str
    text: str


# What the pages hold


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    """Code blocks of a page in docs/."""
    return [code for found, code in BLOCK.findall(text_of(DOCS / page)) if found == language]


def shell_lines() -> Iterator[Line]:
    """Lines of `bash` blocks, lines of other blocks that begin with a command, and code spans that are commands."""
    for page in PAGES:
        text = text_of(page)
        for language, code in BLOCK.findall(text):
            for line in code.replace("\\\n", " ").splitlines():
                if is_command(line) or (language in ("bash", "sh") and line.strip() and not line.startswith("#")):
                    yield Line(page.name, line)
        for span in SPAN.findall(BLOCK.sub("", text)):
            if is_command(span) and " " in span:
                yield Line(page.name, span)


def is_command(text: str) -> bool:
    first = text.split(" ")[0]
    return first in BEGINNINGS or (first.startswith(BEGINNINGS[-1]) and first != BEGINNINGS[-1])


# What is typed, checked without running it


def words_of(text: str) -> list[str]:
    """The words of one command, up to a redirection, pipe or `&&`; placeholders replaced."""
    text = ANSI_C_QUOTES.sub(lambda found: shlex.quote(found[1].encode().decode("unicode_escape")), text)
    words = shlex.split(text, comments=True)
    ends = [place for place, word in enumerate(words) if word in ("|", ">", "<", ">>", "&&", "||", ";", "&", "2>&1")]
    words = [word.strip("[]") if word.startswith("[") else word for word in words[: min(ends, default=len(words))]]
    return [substituted(word) for word in words if word.strip("[]") not in GENERIC]


def substituted(word: str) -> str:
    """Capitals that are a whole word or a whole part of a path, but no quoted text."""
    return re.sub(
        r"(?<![\w\"'])\$?[A-Z][A-Z_]*(?![\w\"'])", lambda found: PLACEHOLDERS.get(found[0], found[0].lower()), word
    )


def check(words: list[str]) -> None:
    """Raise what typing `words` would, as far as that is known before anything starts."""
    while words and re.match(r"[A-Za-z_]+=", words[0]):  # variables of the environment
        words = words[1:]
    program, arguments = words[0].removeprefix(".venv/bin/"), words[1:]
    if program == "python" and arguments[:1] == ["-m"]:
        program, arguments = arguments[1], arguments[2:]
    assert program in PROGRAMS or importlib.util.find_spec(program), f"{program}: neither a module nor a known command"
    PROGRAMS.get(program, check_nothing)(arguments)


def check_launch(arguments: list[str], *defaults: str) -> None:
    """Compose the stage that is asked for, and each earlier one that the line gives keys or an experiment for."""
    if any(argument.startswith("-") for argument in arguments):
        return  # Hydra's own views: --help, --cfg job
    arguments = with_command_file(arguments)
    given = {argument.partition("=")[0] for argument in arguments}
    overrides = (*(default for default in defaults if default.partition("=")[0] not in given), *arguments)
    if "stage" not in {override.partition("=")[0] for override in overrides}:
        overrides = ("stage=code", *overrides)
    compose_line(overrides)


@cache
def compose_line(overrides: tuple[str, ...]) -> None:
    target = target_stage(overrides)
    check_stage_prefixes(overrides, target)
    named = re.findall(r"^stages\.(\w+)\.", "\n".join(overrides), re.MULTILINE)
    with_experiment = any(override.startswith("experiment=") for override in overrides)
    for stage in {target, *(may_need(target) if with_experiment else named)}:
        config = compose_config(overrides_of(stage, target, overrides))
        if config.dry_run and isinstance(stage_named(stage), TrainingStage):
            check_layout(config, cuts_matrices=any(override.startswith("parallel.tp=") for override in overrides))


def check_layout(config: Config, cuts_matrices: bool) -> None:
    """The layout fits; no line advises tensor parallelism where a node holds the model."""
    layout = with_layout(config, ranks_planned(config)).parallel
    assert cuts_matrices or layout.tp == 1, f"model={config.model.name}: parallel.tp={layout.tp}"


def check_verb(arguments: list[str]) -> None:
    """Walk down the verbs and let the last one parse its options."""
    command: Any = typer.main.get_command(app)
    name = "dist-lm"
    while arguments and hasattr(command, "commands"):
        name, *arguments = arguments
        assert name in command.commands, f"dist-lm has no verb {name}: {', '.join(command.commands)}"
        command = command.commands[name]
    if arguments:
        command.make_context(name, list(arguments))
    if name == "bench" and arguments[:1] == ["learn"]:
        given = command.make_context(name, list(arguments)).params
        recipes_of(given["overrides"] or [], given["recipe"] or [], given["peer"] or [])
    elif name == "bench" and arguments[:1] == ["scaling"]:
        given = command.make_context(name, list(arguments)).params
        recipes_of(given["overrides"] or [], [], [])
        assert [numbers_of(f"--{option}", given[option]) for option in ("widths", "tokens")]
    elif name == "bench" and arguments:
        benchmark = benchmark_at(BENCHMARKS[arguments[0]])
        if overrides := [word for word in arguments[1:] if "=" in word and not word.startswith("-")]:
            benchmark.cases(overrides, True)


def check_script(arguments: list[str]) -> None:
    """A shell script of the checkout; the quick start takes what the launcher takes."""
    options = [word for word in arguments if word.startswith("-")]
    script, *rest = [word for word in arguments if word not in options or word in arguments[1:]]
    assert (ROOT / script).is_file(), f"{script}: no such script"
    if script == "launch/quickstart.sh":
        check_launch(rest, *launcher_defaults(script))
    if script == "launch/test.sh":
        check_tests(rest)


def check_batch(arguments: list[str]) -> None:
    """sbatch: options, a script, then what the launcher takes."""
    place = next(place for place, word in enumerate(arguments) if not word.startswith("-"))
    assert all(option.startswith("--") and "=" in option for option in arguments[:place]), arguments[:place]
    script = arguments[place]
    assert (ROOT / script).is_file(), f"{script}: no such script"
    if script == "slurm/serve.sh":
        check_verb(["serve", *arguments[place + 1 :]])
        return
    defaults = launcher_defaults(script)
    given = [*(("stage.prompts=prompts.jsonl",) if "stage=generate" in defaults else ()), *defaults]
    check_launch(arguments[place + 1 :], *given)


def launcher_defaults(script: str) -> list[str]:
    """The arguments for the launcher that a script itself gives."""
    started = re.search(
        r"^ *(?:run_job|exec python -m dist_lm\.launch) (.*?)(?: --)? \"\$@\"$", text_of(ROOT / script), re.M
    )
    assert started, f"{script}: starts no launcher"
    return started[1].split()


def check_torchrun(arguments: list[str]) -> None:
    """torchrun: options, a module, and for training without a launcher what the launcher takes."""
    place = arguments.index("-m") + 1
    module, overrides = arguments[place], arguments[place + 1 :]
    assert importlib.util.find_spec(module), f"{module}: no such module"
    if module == "dist_lm.train" and any("=" in override for override in overrides):
        check_launch(overrides)


def check_tests(arguments: list[str]) -> None:
    for path in [word.split("::")[0] for word in arguments if word.startswith("tests")]:
        assert (ROOT / path).exists(), f"{path}: no such tests"


def check_nothing(arguments: list[str]) -> None:
    """Programs of others, and modules whose options are their own."""


PROGRAMS: dict[str, Callable[[list[str]], None]] = {
    "dist_lm.launch": check_launch,
    "dist-lm-launch": check_launch,
    "dist_lm": check_verb,
    "dist-lm": check_verb,
    "bash": check_script,
    "sbatch": check_batch,
    "torchrun": check_torchrun,
    "pytest": check_tests,
    **dict.fromkeys(
        ("pip", "source", "eval", "export", "python", "cat", "scancel", "scontrol", "squeue", "ray"), check_nothing
    ),
}


@pytest.mark.parametrize("line", sorted(set(shell_lines())), ids=lambda line: f"{line.page}: {line.text[:60]}")
def test_shell_line_can_be_typed(line: Line):
    check(words_of(line.text))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("python -m dist_lm.launch stage=code stage.no_such_key=1", "no_such_key"),
        ("sbatch --nodes=2 slurm/train_large.sh stages.code.no_such_key=1", "no_such_key"),
        ("dist-lm generate work/runs/code/default --no-such-option", "no-such-option"),
        ("dist-lm no-such-verb", "no-such-verb"),
        ("bash launch/no_such.sh", "no_such.sh"),
        ("torchrun -m dist_lm.no_such_module RUN", "no_such_module"),
        ("torchrun -m dist_lm.train stage=code stage.no_such_key=1", "no_such_key"),
    ],
)
def test_a_wrong_line_is_found(text: str, named: str):
    with pytest.raises(Exception, match=named):
        check(words_of(text))


def test_quoted_values_of_a_line_arrive():
    line = next(line for line in shell_lines() if "stage.logit_bias=" in line.text)
    stage = compose_config(words_of(line.text)[3:]).stage
    assert stage.stop == ["\n\n", "END"]
    assert stage.stop_tokens == [4, 5]
    assert stage.logit_bias == {13: -2.5, 7: 1.0}


# Files, links, keys


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_files_of_a_page_exist(page: Path):
    text = BLOCK.sub("", text_of(page))
    missing = []
    for target in LINK.findall(text):
        path, _, anchor = target.partition("#")
        if path.startswith(("http:", "https:")):
            continue
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            missing.append(target)
    for span in SPAN.findall(text):
        path = span.split("::")[0].split(" ")[0]
        if path.startswith(FOLDERS) and not re.search(r"[A-Z*{<]", path) and not (ROOT / path).exists():
            missing.append(span)
        # This page names files of the package from its top on.
        is_of_package = page.name == "architecture.md" and re.fullmatch(r"[a-z_]+/[a-z_/0-9]+\.py", path)
        if is_of_package and not path.startswith(FOLDERS) and not (ROOT / "dist_lm" / path).exists():
            missing.append(span)
    assert not missing, f"{page.name} names what is not there: {', '.join(missing)}"


def anchors(page: Path) -> set[str]:
    """Names of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", BLOCK.sub("", text_of(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@cache
def configurations() -> tuple[Config, ...]:
    needed = {"generate": ("stage.prompts=prompts.jsonl",)}
    return tuple(compose_config([f"stage={stage}", *needed.get(stage, ())]) for stage in choices("stage"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_dotted_names_of_a_page_exist(page: Path):
    spans = SPAN.findall(BLOCK.sub("", text_of(page)))
    names = [span for span in spans if re.fullmatch(r"dist_lm(\.\w+)+", span) and span != "dist_lm.stages"]
    missing = [name for name in names if not found(name)]
    assert not missing, f"{page.name} names what is not there: {', '.join(missing)}"


def found(name: str) -> bool:
    """Whether a dotted name is a module, or something in one."""
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_configuration_keys_of_a_page_exist(page: Path):
    groups = "stage|stages|model|parallel|cluster|tracking|hardware|corpus|rlhf|eval"
    spans = SPAN.findall(BLOCK.sub("", text_of(page)))
    named = [found[0] for span in spans if (found := re.match(rf"(?:{groups})(?:\.[a-z_0-9]+)+(?==|$)", span))]
    keys = {re.sub(r"^stages\.\w+", "stage", key) for key in named if not key.endswith((".py", ".yaml", ".json"))}
    unknown = [key for key in sorted(keys) if not any(has_key(config, key.split(".")) for config in configurations())]
    assert not unknown, f"{page.name} names keys that no stage has: {', '.join(unknown)}"


def has_key(value: Any, parts: list[str]) -> bool:
    """Whether a configuration has a key; below a mapping, a list or an unset value every name is accepted."""
    if not parts or not is_dataclass(value):
        return True
    return hasattr(value, parts[0]) and has_key(getattr(value, parts[0]), parts[1:])


# Snippets and tables


@pytest.fixture
def code_run(tiny_work, tmp_path, monkeypatch) -> RunDirectory:
    """work/runs/code/default below the current directory, with an untrained model."""
    run = write_untrained(linked(tiny_work, tmp_path / "work"), "code", seed=0)
    save_config(compose_config(["stage=code", *TINY]), run.config)
    monkeypatch.chdir(tmp_path)
    return run


def run_block(page: str, word: str) -> dict[str, Any]:
    """Run the first block of Python that holds `word` as a program; its names afterwards."""
    names: dict[str, Any] = {"__name__": "__main__"}
    code = next(code for code in blocks(page, "python") if word in code)
    exec(compile(code, page, "exec"), names)
    return names


def test_engine_of_the_generation_page_answers(code_run, capsys):
    run_block("generation.md", "engine.submit(")
    lines = capsys.readouterr().out.splitlines()
    assert sorted(line.split()[0] for line in lines) == ["0", "1"]
    assert all(line.split()[1] in ("eot", "length") for line in lines)


@pytest.mark.cluster
def test_pool_of_the_generation_page_answers(code_run):
    answers = run_block("generation.md", "Pool.start(")["answers"]
    assert [answer.request for answer in answers] == [f"r{i}" for i in range(8)]
    assert all(isinstance(answer, Answer) and answer.version == 2 for answer in answers)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_that_snippets_import_exist(page: Path):
    for language, code in BLOCK.findall(text_of(page)):
        for module, names in (
            re.findall(r"^from (dist_lm[\w.]*) import ([\w, ]+)$", code, re.M) if language == "python" else ()
        ):
            for name in names.split(", "):
                assert hasattr(importlib.import_module(module), name), f"{page.name}: {module} has no {name}"


def entries_of(layout: Layout) -> int:
    """Tensors that a rank plans to save for the eight ranks of its node, at any layout: a parameter of `large`, two of
    its optimizer and its count of steps."""
    return 8 * 4 * len(parameter_shapes(compose_config(["stage=language", "model=large"]).model))


@pytest.mark.parametrize(
    ("row", "count"), [("start: connections", connections_of), ("save: entries", entries_of)], ids=["start", "save"]
)
def test_counts_of_the_scale_page_follow_from_the_code(row: str, count: Callable[[Layout], int]):
    """Finds a page that a further group of ranks, or parameters of `large`, have made untrue."""
    line = next(line for line in text_of(DOCS / "scale.md").splitlines() if line.startswith(f"| {row}"))
    printed = [cell.strip() for cell in line.strip("|").split("|")[2:]]
    assert printed == [f"{count(Layout(nodes, 8, 1)):,}" for nodes in (1, 8, 64, 1250)]


def test_metrics_page_is_the_one_that_the_registry_makes():
    assert text_of(DOCS / "metrics.md") == metrics_page(), "run `python -m dist_lm metrics > docs/metrics.md`"


# Length


def test_readme_has_at_most_160_lines():
    assert len(text_of(ROOT / "README.md").splitlines()) <= 160


# pages of later features, and decisions, have limits of their own
WORDS_OF_A_PAGE = {"data.md": 2_500, "in_and_out.md": 2_850, "decisions.md": 8_500, "recipes.md": 1_250}
WORDS_OF_A_PAGE["architecture.md"] = 2_550  # the map of the code: packages, nouns, what runs when
WORDS_OF_A_PAGE["sandbox.md"] = 1_700  # what a test has of a program, and which answers win nothing
WORDS_OF_A_PAGE["algorithms.md"] = 1_500
WORDS_OF_A_PAGE["chat.md"] = 1_350  # rows of other tools
WORDS_OF_A_PAGE["security.md"] = 600  # what another user can do, and the ports of a run
WORDS_OF_A_PAGE["rlhf.md"] = 1_520  # what a reward function is called with
WORDS_OF_A_PAGE["reward.md"] = 900  # rows of other tools
WORDS_OF_A_PAGE |= {"constraints.md": 720, "serve.md": 1_250, "editors.md": 400}
WORDS_OF_A_PAGE["metrics.md"] = 2_780  # generated: it grows with the metrics
WORDS_OF_A_PAGE |= {"lm_eval.md": 350, "evaluation.md": 870, "eval_tasks.md": 500, "hidden_tests.md": 450}
WORDS_OF_A_PAGE["finetune.md"] = 980  # from a model and conversations to a model that answers
WORDS_OF_A_PAGE["data_files.md"] = 550  # formats, compression and splits of sources
WORDS_OF_A_PAGE["environments.md"] = 900  # an environment of your own; those of the project
WORDS_OF_A_PAGE["agents.md"] = 900  # training with an environment, looking inside, forks
WORDS_OF_A_PAGE["program_agents.md"] = 750  # an agent of 40 lines, what the endpoint answers, cheats
WORDS_OF_A_PAGE["asynchronous.md"] = 350  # what is taken, refused and recorded while the learner updates
WORDS_OF_A_PAGE["first_agent.md"] = 520  # an environment, a run and a fork, step by step
WORDS_OF_A_PAGE["scale.md"] = 850  # costs by number of ranks, and what breaks at 10,000
WORDS_OF_A_PAGE["large_corpora.md"] = 400  # an order of units, what ranks share, its figures
WORDS_OF_A_PAGE["remote_corpora.md"] = 550  # a corpus in a bucket: the cache, and what can go wrong
WORDS_OF_A_PAGE["builds.md"] = 420  # corpora built by tasks: passes, interruptions, disk
WORDS_OF_A_PAGE["extended_corpora.md"] = 380  # sources added to a finished corpus: what stays, what is excluded
WORDS_OF_A_PAGE["near_duplicates.md"] = 500  # which of equal and nearly equal documents stays
WORDS_OF_A_PAGE["tests.md"] = 720  # on which layout, dtype and length each equality was shown
WORDS_OF_A_PAGE["provenance.md"] = 620  # documents of a step, a run without some of them, benchmarks
WORDS_OF_A_PAGE["mixtures.md"] = 750  # phases: what they read, what may change


def test_docs_are_short():
    """Without the results of `dist-lm gpu check`, which the command writes."""
    lengths = {page.name: len(text_of(page).split()) for page in DOCS.glob("*.md")}
    for name, most in WORDS_OF_A_PAGE.items():
        assert lengths.pop(name, 0) <= most, name
    written = sum(lengths.values())
    before, _, rest = text_of(DOCS / "gpu.md").partition(results.BEGIN)
    generated, _, _ = rest.partition(results.END)
    assert before
    assert written - len(generated.split()) <= 8_420
