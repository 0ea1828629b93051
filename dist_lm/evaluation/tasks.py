"""Defines the tasks of stage `evaluate`: the questions to a model, and how its answers are judged.

An item is one question of a task. Code is judged by its tests in the sandbox, beside generation; calls of functions are
compared with the expected ones.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dist_lm.chat.messages import Conversation, Message, Tool
from dist_lm.chat.template import prompt as chat_prompt
from dist_lm.chat.template import stop_tokens
from dist_lm.config.evaluation import CODE_TASKS, FILE_TASKS, FIXED_TESTS, LOOP_TASKS, OWN_TESTS
from dist_lm.data import order
from dist_lm.data.infill import InfillMarks
from dist_lm.data.manifest import manifest_path, read_manifest
from dist_lm.data.prompts import Prompt
from dist_lm.data.token_corpus import TokenCorpus
from dist_lm.errors import ArtefactError, UserError
from dist_lm.evaluation.bfcl_questions import BfclQuestion, find_data, read_questions
from dist_lm.evaluation.bfcl_score import is_right
from dist_lm.evaluation.problems import Problem, humaneval, mbpp, multipl_e, own_infills, own_problems
from dist_lm.evaluation.tool_questions import Asked, choose, no_questions
from dist_lm.evaluation.tool_score import judge, read_answer
from dist_lm.generation.call_grammar import call_constraint
from dist_lm.generation.constraint import Constraint
from dist_lm.generation.request import Answer, SamplingParams
from dist_lm.sandbox.hidden import References
from dist_lm.sandbox.pool import Sandboxes
from dist_lm.sandbox.program import Language, Limits, Program
from dist_lm.sandbox.sandbox import fences
from dist_lm.storage.run_directory import WorkDirectory
from dist_lm.tokenizer.tokenizer import Tokenizer

OWN_TASKS: dict[str, Language] = {"own_python": "python", "own_bash": "bash", "own_sql": "sql"}
READERS = dict(zip(FILE_TASKS, (humaneval, mbpp, multipl_e), strict=True))
INFILL, TOOLS, BFCL, BITS, REWARD = "infill", "tools", "bfcl", "bits_per_byte", "reward"
TASKS = (*LOOP_TASKS, BITS, REWARD)
CHATS = ("sft", "tools", "rlhf", "preference")  # stages whose models answer requests
TURN_TOKENS = 512  # most tokens of an answer with calls
QUESTIONS = 100  # questions of each kind of conversation
CPU_S = 3.0  # CPU seconds of a program with its tests

Record = dict[str, Any]
"""The judgement of an answer: `passed`, `outcome`, and further facts of its task."""
Judge = Callable[[Answer, Sandboxes | None], Callable[[], Record]]
"""Function of (answer, sandboxes) that begins a judgement and returns a function that waits for it."""


@dataclass(frozen=True)
class Item:
    """One question."""

    id: str
    group: str  # level, kind or category
    prompt: Sequence[int]
    params: SamplingParams
    n: int  # number of answers
    judge: Judge
    error: str = ""  # why it cannot be asked; such a question counts as failed
    constraint: Constraint | None = None  # the form that an answer must have


@dataclass(frozen=True)
class Asking:
    """The settings by which a model is asked."""

    tokenizer: Tokenizer
    context: int  # the model's maximum sequence length
    chat: bool  # whether questions are turns of a user
    params: SamplingParams  # for questions about code
    n: int  # number of answers to a question about code
    limits: Limits
    hidden_seed: int | None = None  # seed of the hidden tests of our own problems; None: only their fixed tests
    constrain_calls: bool = False  # whether only calls that fit their tool's schema can be drawn

    @classmethod
    def greedy(
        cls,
        tokenizer: Tokenizer,
        context: int,
        chat: bool,
        new_tokens: int,
        hidden_seed: int | None = None,
        constrain_calls: bool = False,
    ) -> "Asking":
        """Returns the settings for one greedy answer to each question."""
        params, limits = SamplingParams(new_tokens, 0.0), limits_of(CPU_S)
        return cls(tokenizer, context, chat, params, 1, limits, hidden_seed, constrain_calls)

    def turn_constraint(self, tools: Sequence[Tool]) -> Constraint | None:
        """Returns the constraint of a turn that may call these tools; None if calls are not constrained.

        Raises:
            ChatError: a schema is one that `check_tool` refuses.
        """
        if not self.constrain_calls:
            return None
        return call_constraint(tools, self.tokenizer, strict=False)


def hidden_seed_of(version: int, seed: int, run: Path) -> int | None:
    """Returns the seed of the hidden tests of our own problems, for `Asking`: `seed`, or None for a run that began with
    the fixed tests alone (`FIXED_TESTS`).

    Args:
        version: the version of the tests that the run began with.
        seed: the seed of the run.
        run: the folder of the run, for the message.

    Raises:
        ArtefactError: this release has no tests of that version.
    """
    if version == FIXED_TESTS:
        return None
    if version != OWN_TESTS:
        raise ArtefactError(
            f"{run}: began with version {version} of the tests of our own problems, this release has {OWN_TESTS}: go "
            "on with the release that it began with, or choose another run_id"
        )
    return seed


def limits_of(cpu_s: float) -> Limits:
    """Returns the limits of a program with its tests."""
    return Limits(cpu_s=cpu_s, wall_s=max(4.0, 8 * cpu_s))


def asks_as_chat(stage: str, tokenizer: Tokenizer) -> bool:
    """Returns whether questions are turns of a user: a stage of conversations, or an imported chat model."""
    return tokenizer.kept_template is not None or stage in CHATS


def check_tasks(tasks: Sequence[str], files: Mapping[str, Path], trust_me: bool) -> None:
    """Refuses tasks whose files cannot be read, or whose programs cannot run here; reads the files and tries the
    sandbox.

    Raises:
        ConfigError: a file is missing or invalid, or there is no sandbox (SandboxError).
    """
    for task in tasks:
        if task in READERS:
            READERS[task](files[task])
    if any(task in CODE_TASKS for task in tasks):
        fences(trust_me)


def items_of(
    task: str, asking: Asking, files: Mapping[str, Path], tools: Path, prompts: Sequence[Prompt] = ()
) -> list[Item]:
    """Returns the questions of a task, the same at every call; those that do not fit the context have an error.

    Args:
        files: files of the tasks in FILE_TASKS.
        tools: folder of the corpus of conversations, for the task tools.
        prompts: prompts for the task reward.

    Raises:
        ConfigError: a file is missing or invalid.
        ArtefactError: a corpus or a package is missing, or a corpus gives no question.
        UserError: the tokenizer lacks a mark, or a text holds a lone surrogate.
        OSError: a file cannot be read.
    """
    if task in OWN_TASKS:
        return code_items(own_problems(OWN_TASKS[task]), asking)
    if task in FILE_TASKS:
        return code_items(READERS[task](files[task]), asking)
    if task == INFILL:
        return infill_items(own_infills(), asking)
    if task == TOOLS:
        return tool_items(asking, tools)
    if task == REWARD:
        return prompt_items(prompts, asking)
    assert task == BFCL
    return bfcl_items(asking, read_questions(find_data(), limit=0))


def code_items(problems: Iterable[Problem], asking: Asking) -> list[Item]:
    """Returns problems as beginnings for a base model to complete, or as requests to a chat model.

    A problem that does not fit the context has an error.

    Raises:
        UserError: the tokenizer lacks the marks of a conversation, or a text holds a lone surrogate.
    """

    execution = Execution(asking)

    def judge_of(problem: Problem) -> Judge:
        def judge_program(answer: Answer, sandboxes: Sandboxes | None) -> Callable[[], Record]:
            if asking.chat:
                program = problem.answered(answer.text)
            else:
                program = problem.completed(answer.text, stopped=answer.finish == "stop")
            return execution(problem, program, sandboxes)

        return judge_program

    items = []
    for problem in problems:
        if asking.chat:
            tokens = chat_prompt(Conversation((Message("user", problem.question),)), asking.tokenizer)
            params = replace(asking.params, stop_tokens=stop_tokens(asking.tokenizer))
        else:
            # A base model goes on with other code, so texts that cannot belong to the answer end it.
            tokens = asking.tokenizer.encode_prompt(problem.prompt)
            params = replace(asking.params, stop=problem.stop)
        item = Item(problem.id, group_of(problem), tokens, params, asking.n, judge_of(problem))
        items.append(_fitting(item, asking))
    return items


def infill_items(problems: Iterable[Problem], asking: Asking) -> list[Item]:
    """Returns lines to fill in, between the code before and behind them; those that do not fit the context have an
    error.

    Raises:
        UserError: the tokenizer lacks the marks.
    """
    marks = InfillMarks.of(asking.tokenizer)
    execution = Execution(asking)

    def judge_of(problem: Problem) -> Judge:
        return lambda answer, sandboxes: execution(problem, problem.completed(answer.text), sandboxes)

    items = []
    for problem in problems:
        prefix = asking.tokenizer.encode_prompt(problem.prompt)
        suffix = asking.tokenizer.encode(problem.suffix or "")
        params = replace(asking.params, stop=problem.stop)
        tokens = marks.prompt(prefix, suffix)
        item = Item(problem.id, group_of(problem), tokens, params, asking.n, judge_of(problem))
        items.append(_fitting(item, asking))
    return items


def group_of(problem: Problem) -> str:
    """Returns the level of one of our problems; empty for published ones."""
    if problem.level:
        return f"level {problem.level}"
    return ""


class Execution:
    """Runs programs of problems with their fixed tests, and with hidden ones that depend on (seed, problem)."""

    def __init__(self, asking: Asking) -> None:
        self._seed, self._limits = asking.hidden_seed, asking.limits
        self._references = References()

    def __call__(self, problem: Problem, program: Program, sandboxes: Sandboxes | None) -> Callable[[], Record]:
        """Starts the tests of a program and returns a function that waits for the record of their outcome.

        `tests` of the record are (passed, all), `output` the end of what a failed program wrote. The function raises
        what the sandboxes raise.

        Args:
            sandboxes: not None.
        """
        assert sandboxes is not None, "code is executed in a sandbox only"
        if problem.hidden is None or self._seed is None:
            future = sandboxes.submit(program, self._limits)
        else:
            # Keyed by the problem, so its tests are the same whichever problems are asked beside it.
            key = order.key(order.Shuffle.HIDDEN_TESTS, self._seed, order.text_word(problem.id))
            future = self._references.submit(program, problem.hidden, key, sandboxes, self._limits)

        def wait() -> Record:
            verdict = future.result()
            return {
                "passed": verdict.outcome == "passed",
                "outcome": verdict.outcome,
                "tests": [verdict.passed, verdict.total],
                "output": verdict.output[-300:] if verdict.outcome != "passed" else "",
            }

        return wait


def prompt_items(prompts: Iterable[Prompt], asking: Asking) -> list[Item]:
    """Returns prompts whose answers a reward model scores later; every answer counts as passed until then.

    Each has one answer. One that does not fit the context has an error.

    Raises:
        UserError: as `code_items`.
    """
    record: Record = {"passed": True, "outcome": "answered"}
    items = []
    for prompt in prompts:
        tokens, params = asking.tokenizer.encode_prompt(prompt.text), asking.params
        if asking.chat:
            tokens = chat_prompt(Conversation((Message("user", prompt.text),)), asking.tokenizer)
            params = replace(params, stop_tokens=stop_tokens(asking.tokenizer))
        item = Item(str(prompt.id), "", tokens, params, 1, lambda *_: lambda: record)
        items.append(_fitting(item, asking))
    return items


def tool_items(asking: Asking, folder: Path) -> list[Item]:
    """Returns questions of held-out conversations with tools, for one greedy answer each: up to QUESTIONS of each kind,
    those that fit the model's context. All models have the same ids.

    Args:
        folder: the corpus `tools` of the work directory.

    Raises:
        ArtefactError: there are no conversations, none of them gives a question, they were written with an unknown
            tokenizer, or they are damaged.
        UserError: the tokenizer lacks the marks of a conversation (ChatError: a document is no conversation).
        OSError: a file cannot be read.
    """
    if not manifest_path(folder).is_file():
        raise ArtefactError(f"{folder}: no conversations for stage.tasks=[tools]: run stage=tools first")
    corpus, manifest = TokenCorpus.open(folder, "val"), read_manifest(folder)

    # The model may have another tokenizer than the work directory.
    corpus_tokenizer = asking.tokenizer
    if corpus_tokenizer.sha256 != manifest.recipe.tokenizer_sha256:
        corpus_tokenizer = Tokenizer.load(WorkDirectory(folder.parents[1]).tokenizer_model)
        manifest.require_tokenizer(corpus_tokenizer.sha256, folder)
    params = SamplingParams(max_new_tokens=TURN_TOKENS, temperature=0, stop_tokens=stop_tokens(asking.tokenizer))

    def judge_of(asked: Asked) -> Judge:
        def judge_turn(answer: Answer, _: Sandboxes | None) -> Callable[[], Record]:
            turn = read_answer(answer.tokens, answer.finish == "stop", asking.tokenizer)
            verdict = judge(turn, asked.question.expected, asked.question.asked.tools)
            outcome = "no turn"
            if verdict.is_turn:
                outcome = "passed" if verdict.exact else "failed"
            return lambda: {"passed": verdict.exact, "outcome": outcome}

        return judge_turn

    questions = choose(corpus, asking.tokenizer, QUESTIONS, asking.context, corpus_tokenizer)
    if not questions:
        raise ArtefactError(no_questions(corpus, asking.tokenizer, asking.context, corpus_tokenizer))

    items = []
    for asked in questions:
        name = f"tools/{asked.document}.{asked.place}"
        constraint = asking.turn_constraint(asked.question.asked.tools)
        item = Item(name, asked.question.kind, asked.prompt, params, 1, judge_of(asked), constraint=constraint)
        items.append(_fitting(item, asking))
    return items


def bfcl_items(asking: Asking, questions: Sequence[BfclQuestion]) -> list[Item]:
    """Returns questions of the Berkeley Function Calling Leaderboard, for greedy answers.

    Those that are no valid conversation, or do not fit the context, have an error.

    Raises:
        UserError: the tokenizer lacks the mark that ends a turn.
    """
    params = SamplingParams(max_new_tokens=TURN_TOKENS, temperature=0, stop_tokens=stop_tokens(asking.tokenizer))

    def judge_of(question: BfclQuestion) -> Judge:
        def judge_turn(answer: Answer, _: Sandboxes | None) -> Callable[[], Record]:
            turn = read_answer(answer.tokens, answer.finish == "stop", asking.tokenizer)
            right = is_right(turn, question)
            return lambda: {"passed": right, "outcome": "passed" if right else "failed", "is_turn": turn is not None}

        return judge_turn

    items = []
    for question in questions:
        item = Item(question.id, question.category, (), params, 1, judge_of(question))
        try:
            prompt_ids = chat_prompt(question.asked, asking.tokenizer)
            constraint = asking.turn_constraint(question.asked.tools)
            item = _fitting(replace(item, prompt=prompt_ids, constraint=constraint), asking)
        except UserError as error:
            item = replace(item, error=f"not a valid conversation: {error}")
        items.append(item)
    return items


def _fitting(item: Item, asking: Asking) -> Item:
    """Returns the item; if its prompt leaves no space for an answer, with an error in place of the prompt."""
    if len(item.prompt) < asking.context:
        return item
    return replace(item, prompt=(), error=f"{len(item.prompt)} tokens, the model's context is {asking.context}")
