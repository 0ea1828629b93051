"""`rlhf.constraint`: what is refused before a run starts, and which tools the prompts of files and corpora offer."""

import json
from pathlib import Path
from typing import cast

import pytest
import torch

from dist_lm.chat.messages import Tool
from dist_lm.errors import ArtefactError, ConfigError, UserError
from dist_lm.generation.call_grammar import ToolChoice, call_constraint
from dist_lm.generation.constraint import Constraint
from dist_lm.parallel.mesh import World
from dist_lm.prepare.compose import compose_config
from dist_lm.rlhf.learner import IterationReport
from dist_lm.stages.rlhf.config import RlhfRunConfig
from dist_lm.stages.rlhf.constraint import check_constraint, constraint_of_index
from dist_lm.stages.rlhf.controller import rollout_constraints
from dist_lm.stages.rlhf.environment import turn_constraint
from dist_lm.stages.rlhf.program import Reporter
from dist_lm.stages.rlhf.prompts import Prompts, read_all
from dist_lm.storage.run_directory import RunDirectory, WorkDirectory
from dist_lm.tokenizer.tokenizer import KeptTemplate, Tokenizer, text_with_marks
from dist_lm.training.heartbeat import Unheard
from tests.chat.test_kept_template import TRIMS
from tests.conftest import TINY_MODEL, TOOL
from tests.rlhf.toy import rollouts_with

CALLS = "rlhf.constraint=calls"
NO_TOKENIZER = Path("not", "there")
TOOL_ROW = {"type": "function", "function": {"name": "to", "description": "d", "parameters": TOOL.parameters}}


def settings_of(*overrides: str) -> RlhfRunConfig:
    config = compose_config(["stage=rlhf", *TINY_MODEL, "rlhf.pool.cache_tokens=4096", *overrides])
    assert isinstance(config, RlhfRunConfig)
    return config


def prompts_of(work: WorkDirectory, *overrides: str) -> tuple[RlhfRunConfig, Prompts, Prompts, Tokenizer]:
    config = settings_of(f"work_dir={work.path}", *overrides)
    tokenizer = Tokenizer.load(work.tokenizer_model)
    return config, *read_all(config, work.run("rlhf", "any"), tokenizer), tokenizer


def written(path: Path, content: str) -> str:
    path.write_text(content)
    return f"rlhf.constraint={path}"


# --- before the run starts ---


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "expected JSON of a constraint"),
        ('{"schema": {}}', "expected an object with one of json_schema, regex, lark, choice"),
        ('{"json_schema": {"type": "object", "minProperties": 1}}', "#/minProperties: this keyword is not supported"),
        ('{"regex": "(a"}', "constraint.regex: "),
    ],
)
def test_a_file_that_holds_no_constraint_is_refused_by_its_key(tmp_path, content, words):
    """Finds a run that starts all its ranks for a constraint that no answer can follow."""
    override = written(tmp_path / "form.json", content)
    with pytest.raises(ConfigError, match=rf"^rlhf\.constraint={tmp_path}/form\.json: .*{words}"):
        check_constraint(settings_of(override).rlhf, NO_TOKENIZER)


@pytest.mark.parametrize(
    "described",
    [
        {"regex": r"<tool_call>\n\{\"name\": \"to\"\}\n</tool_call>"},
        {"lark": 'start: <tool_call> "a"'},
        {"choice": ["yes", "<tool_call>to</tool_call>"]},
        {"lark": 'start: "<tool_call>" /[a-z]+/'},
        {"lark": r"start: <[0]> /a<\/tool_call>/"},
    ],
)
def test_a_constraint_that_spells_the_mark_of_a_call_is_refused_before_the_start(tmp_path, tiny_work, described):
    """Finds a run whose turns look like calls and are text, so that no tool is ever executed."""
    override = written(tmp_path / "form.json", json.dumps(described))
    with pytest.raises(
        ConfigError,
        match=r"form\.json: </?tool_call> is text in it.* set calls, required_calls or one_call; .* <\[\d+\]>$",
    ):
        check_constraint(settings_of(override).rlhf, tiny_work.tokenizer_model)


@pytest.mark.parametrize(
    "described",
    [
        {"regex": "a tool_call"},
        {"json_schema": {"const": "<tool_call>"}},
    ],
)
def test_a_constraint_that_spells_no_call_is_taken(tmp_path, tiny_work, described):
    override = written(tmp_path / "form.json", json.dumps(described))
    check_constraint(settings_of(override).rlhf, tiny_work.tokenizer_model)


def test_a_grammar_that_names_no_token_of_the_tokenizer_is_refused_before_the_start(tmp_path, tiny_work):
    """Finds a start of all ranks for a grammar that only they could refuse, though the tokenizer is there."""
    override = written(tmp_path / "form.json", json.dumps({"lark": "start: <think> /a/"}))
    with pytest.raises(ConfigError, match=r"form\.json: constraint\.lark: "):
        check_constraint(settings_of(override).rlhf, tiny_work.tokenizer_model)
    check_constraint(settings_of(override).rlhf, NO_TOKENIZER)


def test_a_file_that_is_not_there_is_refused_by_its_key(tmp_path):
    with pytest.raises(
        ConfigError, match=r"^rlhf\.constraint=call: expected calls, required_calls, one_call, or a file of JSON"
    ):
        check_constraint(settings_of("rlhf.constraint=call").rlhf, NO_TOKENIZER)


def test_the_file_is_noted_so_that_a_resumed_run_refuses_another(tmp_path):
    """Finds a run that goes on under another grammar."""
    config = settings_of(written(tmp_path / "form.json", '{"choice": ["yes", "no"]}'))
    check_constraint(config.rlhf, NO_TOKENIZER)
    assert config.noted_files == {f"rlhf.constraint={tmp_path}/form.json": [tmp_path / "form.json"]}
    assert not settings_of().noted_files


@pytest.mark.heavy
def test_calls_without_tools_are_refused_before_the_run_and_by_the_ranks(tiny_work, tmp_path):
    """Finds a constraint that constrains nothing, because a column of tools has another name."""
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"Say {i}"} for i in range(40)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    override = f"rlhf.prompts_from={file}"
    with pytest.raises(ArtefactError, match=r"^rlhf\.constraint=calls: no prompt has tools"):
        check_constraint(settings_of(CALLS, override).rlhf, NO_TOKENIZER)
    config, train, _, tokenizer = prompts_of(tiny_work, CALLS, override)
    with pytest.raises(ArtefactError, match=r"^rlhf\.constraint=calls: no prompt has tools"):
        rollout_constraints(config, train, tokenizer)

    file.write_text(json.dumps({"prompt": "Say", "tools": [TOOL_ROW]}) + "\n" + file.read_text())
    check_constraint(settings_of(CALLS, override).rlhf, NO_TOKENIZER)


# --- the constraint of each prompt ---


@pytest.mark.heavy
def test_prompts_of_a_corpus_offer_the_tools_that_their_tokens_hold(tiny_work):
    """Finds a prompt whose calls follow the tools of another one."""
    config, train, held_out, tokenizer = prompts_of(tiny_work, CALLS, "stage.corpus=tools", "rlhf.max_new_tokens=16")
    for prompts in (train, held_out):
        constraint_of = constraint_of_index(config.rlhf, prompts, tokenizer)
        assert len(prompts.tools) == len(prompts)
        numbers_of_tools = set()
        for index, prompt in enumerate(prompts):
            tools = (TOOL,) if "<tools>" in text_with_marks(prompt, tokenizer) else ()
            assert constraint_of(index) == call_constraint(tools, tokenizer)
            numbers_of_tools.add(len(tools))
        assert numbers_of_tools == {0, 1}

    # Positions of training are those of the shuffled prompts.
    constraints = rollout_constraints(config, train, tokenizer)
    constraint_of = constraint_of_index(config.rlhf, train, tokenizer)
    made = {constraints.constraint_at(position).text for position in range(len(train))}
    assert made == {constraint_of(index).text for index in range(len(train))}
    assert not prompts_of(tiny_work, "stage.corpus=tools", "rlhf.max_new_tokens=16")[1].tools


@pytest.mark.heavy
def test_prompts_of_a_file_offer_the_tools_of_their_rows(tiny_work, tmp_path):
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"Say {i}"} | ({"tools": [TOOL_ROW]} if i % 2 else {}) for i in range(60)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = (f"rlhf.prompts_from={file}", "rlhf.max_new_tokens=16")
    config, train, held_out, tokenizer = prompts_of(tiny_work, CALLS, *overrides)
    for prompts in (train, held_out):
        assert len(prompts.tools) == len(prompts) > 0
        for prompt, tools in zip(prompts, prompts.tools, strict=True):
            assert bool(tools) == ("<tools>" in text_with_marks(prompt, tokenizer))

    text = '{"choice": ["yes", "no"]}'
    config, train, _, tokenizer = prompts_of(tiny_work, written(tmp_path / "form.json", text), *overrides)
    assert not train.tools
    assert constraint_of_index(config.rlhf, train, tokenizer)(7) == Constraint.from_json(json.loads(text))


def test_calls_that_nobody_could_read_are_refused(tiny_work):
    """An imported model's template may write calls in another form: finds answers that no reward can parse."""
    kept = KeptTemplate(TRIMS, (("bos_token", "<|endoftext|>"), ("eos_token", "<|im_end|>")), "2026-01-31")
    tokenizer = Tokenizer(tiny_work.tokenizer_model.read_bytes(), "tokenizer", kept)
    prompts = Prompts([[0]], tools=[(Tool("to", "d", {"type": "object"}),)])
    settings = settings_of(CALLS).rlhf
    for begin in (
        lambda: constraint_of_index(settings, prompts, tokenizer),
        lambda: turn_constraint(settings, tokenizer),
    ):
        with pytest.raises(UserError, match=r"^rlhf\.constraint=calls: the chat template of the model shows no calls"):
            begin()


@pytest.mark.parametrize(
    ("constraint", "choice"),
    [
        ("calls", ToolChoice("auto")),
        ("required_calls", ToolChoice("required")),
        ("one_call", ToolChoice("required", parallel=False)),
    ],
)
def test_calls_may_or_must_be_made_wherever_there_are_tools(tiny_work, constraint, choice):
    """Finds turns that must call where there is nothing to call, and a choice that environments or prompts ignore."""
    settings = settings_of(f"rlhf.constraint={constraint}").rlhf
    tokenizer = Tokenizer.load(tiny_work.tokenizer_model)
    of_turn = turn_constraint(settings, tokenizer)
    assert of_turn is not None
    of_prompt = constraint_of_index(settings, Prompts([[0], [0]], tools=[(TOOL,), ()]), tokenizer)
    assert of_turn([TOOL]) == of_prompt(0) == call_constraint([TOOL], tokenizer, choice, strict=False)
    assert of_turn([]) == of_prompt(1) == call_constraint([], tokenizer)


# --- what a constraint may earn by itself ---


def test_a_reward_that_the_constraint_earns_is_told_once(tmp_path, caplog):
    """All scores are the same: finds a run that trains on nothing for days without a word."""
    config = settings_of(CALLS, "stage.log_every=99", "rlhf.table_rollouts=0")
    world = World(0, 1, 0, torch.device("cpu"))
    reporter = Reporter(config, RunDirectory(tmp_path), world, cast(Tokenizer, None), None, Unheard(), 0, 0, None)

    def report(iteration: int, scores: list[float], **metrics: float) -> None:
        rollouts = rollouts_with([2, 2], [3, 5])
        named = {"timing/iteration_s": 1.0} | {f"rlhf/{name}": number for name, number in metrics.items()}
        reporter(IterationReport(iteration, named, (), rollouts, {}, torch.tensor(scores)))

    report(1, [0.5, 1.0], groups_without_signal=0.5)
    assert not caplog.text
    report(2, [0.5, 1.0], groups_without_signal=1.0)
    assert "iteration 2: all rollouts of a prompt have the same score" in caplog.text
    report(3, [1.0, 1.0])
    assert "iteration 3" not in caplog.text
