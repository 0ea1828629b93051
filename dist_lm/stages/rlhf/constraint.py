"""What completions of stage `rlhf` must be (`rlhf.constraint`): the file is read and tried, tools become grammars. No
torch: the launcher reads this file."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

from dist_lm.chat.messages import Tool
from dist_lm.chat.parse import writes_hermes_calls
from dist_lm.errors import ArtefactError, ConfigError, UserError
from dist_lm.generation.call_grammar import ToolChoice, call_constraint
from dist_lm.generation.constraint import Constraint
from dist_lm.generation.grammar import Grammars, try_constraint
from dist_lm.rlhf.config import CALLS, ONE_CALL, REQUIRED_CALLS
from dist_lm.stages.rlhf.config import RlhfRunGroup
from dist_lm.stages.rlhf.prompts import Prompts, tools_of_files
from dist_lm.tokenizer.symbols import CALL, END_CALL
from dist_lm.tokenizer.tokenizer import Tokenizer

# What a turn with tools may be, by value of rlhf.constraint.
CHOICES = {
    CALLS: ToolChoice("auto"),
    REQUIRED_CALLS: ToolChoice("required"),
    ONE_CALL: ToolChoice("required", parallel=False),
}
BYTES = 257  # tokens of the vocabulary with which a constraint is tried: bytes, and one that ends a text


def no_tools(settings: RlhfRunGroup) -> ArtefactError:
    """Returns the error for a run that constrains calls although no prompt has tools."""
    return ArtefactError(
        f"rlhf.constraint={settings.constraint}: no prompt has tools, so there are no calls to constrain: give prompts "
        "with tools"
    )


def check_constraint(settings: RlhfRunGroup, tokenizer_model: Path) -> None:
    """Refuses a constraint that cannot be followed, before the run starts; returns nothing.

    Args:
        tokenizer_model: file of the tokenizer. While it is not there, a Lark grammar, which may name tokens, is left
            to the ranks.

    Raises:
        ConfigError: the file of rlhf.constraint is missing, or holds no constraint, one that cannot be followed, or one
            that spells a call of a tool as text.
        ArtefactError: calls are constrained, and no row of rlhf.prompts_from has tools.
        UserError: the package llguidance is not installed.
    """
    path = settings.constraint_file
    if path is None:
        # The tools of an environment are known when it begins a task.
        if settings.environment:
            return
        if settings.prompts_from and not any(tools_of_files(settings)):
            raise no_tools(settings)
        return

    constraint = read_constraint(path, settings.constraint)
    tokenizer = Tokenizer.load(tokenizer_model) if tokenizer_model.is_file() else None
    try:
        if tokenizer:
            _refuse_spelled_calls(constraint, tokenizer)
            Grammars(lambda: tokenizer).prepare(constraint)
        elif constraint.kind != "lark":
            try_constraint(constraint.kind, constraint.text, BYTES)
    except UserError as error:
        raise ConfigError(f"rlhf.constraint={settings.constraint}: {error}") from error


def _refuse_spelled_calls(constraint: Constraint, tokenizer: Tokenizer) -> None:
    """Refuses a constraint that spells the mark of a call: the model would write it as text, which is no call.

    Raises:
        ConfigError: it spells one that the tokenizer has as a token.
    """
    if constraint.kind == "json_schema":
        return  # JSON holds no call, whatever its texts are

    text = constraint.text.replace("\\", "")
    for mark in (CALL, END_CALL):
        if mark in tokenizer.special_ids and mark in text:
            raise ConfigError(
                f"{mark} is text in it, which is no call: for calls of the tools set {CALLS}, {REQUIRED_CALLS} or "
                f"{ONE_CALL}; in a Lark grammar of your own the token is <[{tokenizer.special_ids[mark]}]>"
            )


def read_constraint(path: Path, shown_path: str) -> Constraint:
    """Returns the constraint in a file of JSON.

    Args:
        shown_path: the path as the configuration has it, for messages.

    Raises:
        ConfigError: the file cannot be read, or holds no constraint.
    """
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"rlhf.constraint={shown_path}: expected JSON of a constraint ({error})") from error

    try:
        return Constraint.from_json(described)
    except ConfigError as error:
        raise ConfigError(f"rlhf.constraint={shown_path}: {error}") from error


def constraint_of_index(settings: RlhfRunGroup, prompts: Prompts, tokenizer: Tokenizer) -> Callable[[int], Constraint]:
    """Returns a function that gives the constraint of the prompt at an index of `prompts`.

    Raises:
        ConfigError: the file of rlhf.constraint holds no constraint.
        UserError: as `constraint_of_tools`.
    """
    path = settings.constraint_file
    if path is not None:
        constraint = read_constraint(path, settings.constraint)
        return lambda index: constraint

    constraint_of = constraint_of_tools(settings, tokenizer)
    return lambda index: constraint_of(prompts.tools[index])


def constraint_of_tools(settings: RlhfRunGroup, tokenizer: Tokenizer) -> Callable[[Sequence[Tool]], Constraint]:
    """Returns a function that gives the constraint of a turn that may, or must, call these tools.

    A turn without tools may have no calls. Keywords of their schemas that no grammar holds to are left out, as in the
    other commands that constrain calls.

    Raises:
        UserError: the chat template of an imported model writes calls in another form than ours.
    """
    if tokenizer.kept_template and not writes_hermes_calls(tokenizer):
        raise UserError(
            f"rlhf.constraint={settings.constraint}: the chat template of the model shows no calls in the form "
            "<tool_call>JSON</tool_call>, which rewards could read: leave it out"
        )

    # Many prompts offer the same tools, whose schemas take milliseconds to check.
    @lru_cache(maxsize=256)
    def constraint_of_json(tools_json: str) -> Constraint:
        tools = [Tool(**tool) for tool in json.loads(tools_json)]
        choice = CHOICES[settings.constraint] if tools else None
        return call_constraint(tools, tokenizer, choice, strict=False)

    return lambda tools: constraint_of_json(json.dumps([asdict(tool) for tool in tools]))
