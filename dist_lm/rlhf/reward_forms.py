"""The forms of a user's reward function, told apart by the names of its parameters, and the call of each.

| form | parameters | returns |
| --- | --- | --- |
| plain | `(request, completion)`; by keyword also `row` and `messages` if it has them | a number |
| TRL | `(prompts, completions, **columns)`: lists, a column of the rows for each further name | a number for each |
| verl | `(data_source, solution_str, ground_truth, extra_info)` | a number, or a dict with `score` |
| verl, batched | `(data_sources, solution_strs, ground_truths, extra_infos)` | a list of these |

A function that has `completions`, `completion_ids` or `solution_strs` is called with many completions at once. None in
place of a number means that the function does not apply. Coroutine functions are awaited. No torch: the launcher and
the function's own process read this file.

The calls follow trl 1.16 (`GRPOTrainer._calculate_rewards`) and verl (`NaiveRewardManager`, `BatchRewardManager`).
"""

import asyncio
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

FORMS = (
    "score(request, completion), with row or messages if it needs them; TRL's f(prompts, completions, **columns); or "
    "verl's compute_score(data_source, solution_str, ground_truth, extra_info), or the same with lists "
    "(data_sources, solution_strs, ground_truths, extra_infos)"
)
PROMPT, GROUND_TRUTH, DATA_SOURCE, EXTRA_INFO = "prompt", "ground_truth", "data_source", "extra_info"  # columns
REWARD_MODEL = "reward_model"  # verl's column, an object with the ground truth

Answer = dict[str, Any]
"""A score as the process sends it: `{"value": number}`, `{"none": true}` or `{"failure": reason}`."""


@dataclass(frozen=True)
class Judged:
    """A completion as a function may ask for it; JSON values."""

    request: str  # text of the user's last turn
    completion: str
    tokens: Sequence[int] = ()
    messages: Sequence[Mapping[str, Any]] = ()  # turns of the prompt, in OpenAI's format
    columns: Mapping[str, Any] = field(default_factory=dict)  # columns of the prompt's row, the prompt included

    @property
    def is_chat(self) -> bool:
        """Whether the row has turns as its prompt, not a text; a prompt of a corpus has turns."""
        return not isinstance(self.columns.get(PROMPT), str)

    @property
    def ground_truth(self) -> Any:
        """verl's ground truth, or the column of that name; None if there is neither."""
        reward_model = self.columns.get(REWARD_MODEL)
        if isinstance(reward_model, Mapping) and reward_model.get(GROUND_TRUTH) is not None:
            return reward_model[GROUND_TRUTH]
        return self.columns.get(GROUND_TRUTH)


@dataclass(frozen=True)
class Form:
    """How a function is called."""

    name: str  # plain | trl | verl | verl_batched
    parameters: frozenset[str]  # names that it takes by keyword
    required: frozenset[str] = frozenset()  # those without a default
    takes_all: bool = False  # it has **keywords

    @property
    def is_batched(self) -> bool:
        """Whether a call takes many completions."""
        return self.name in ("trl", "verl_batched")

    @property
    def reads_rows(self) -> bool:
        """Whether it sees the row or the turns of a prompt."""
        return self.name != "plain" or bool(self.parameters & {"row", "messages"})

    @property
    def columns(self) -> frozenset[str]:
        """Columns that TRL's form cannot do without."""
        if self.name != "trl":
            return frozenset()
        return self.required - {*_OF_TRL}

    @property
    def needs_ground_truth(self) -> bool:
        """Whether each row must have a ground truth: verl's form without a default for it."""
        return bool(self.required & {"ground_truth", "ground_truths"}) and self.name.startswith("verl")

    def takes(self, name: str) -> bool:
        """Returns whether the function takes this keyword."""
        return self.takes_all or name in self.parameters


_OF_TRL = ("prompts", "completions", "completion_ids", "log_extra", "log_metric")
_OF_VERL = ("data_source", "solution_str", "ground_truth", "extra_info")


def form_of(function: Callable[..., Any]) -> Form:
    """Returns the form of a function.

    Raises:
        ValueError: it has none of the forms; the message says what it has and what is accepted.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a function of C may have no signature
        return Form("plain", frozenset())

    parameters = signature.parameters.values()
    by_keyword = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    required = frozenset(p.name for p in by_keyword if p.default is p.empty)
    names = frozenset(p.name for p in by_keyword)
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)

    # Some functions of TRL read the tokens alone, or the prompts.
    is_trl = names & {"completions", "completion_ids"} or ("prompts" in names and takes_all and "queries" not in names)
    if is_trl:
        return Form("trl", names, required, takes_all)
    for name, known in (("verl", _OF_VERL), ("verl_batched", tuple(f"{name}s" for name in _OF_VERL))):
        # The name of the answer tells both forms of verl from each other and from all others.
        if known[1] in names:
            if unknown := sorted(required - {*known}):
                raise ValueError(f"needs {', '.join(unknown)}, which {', '.join(known)} do not have: give a default")
            return Form(name, names, required, takes_all)

    # Our own form takes two values by position, and two more by name.
    extra = {"row": None, "messages": None}
    form = Form("plain", names & {*extra}, required)
    try:
        signature.bind("", "", **{name: extra[name] for name in form.parameters})
    except TypeError as error:
        raise ValueError(f"has the parameters {signature} ({error}); expected {FORMS}") from None
    return form


def scores(function: Callable[..., Any], form: Form, judged: Sequence[Judged]) -> list[Any]:
    """Calls the function, once, and returns what it gives for each completion; in the forms of verl, of a dict its
    `score`. A form that is not batched takes one. A coroutine is awaited.

    Raises:
        TypeError, ValueError: it returns no list, or not one value for each completion. What the function raises
            passes.
    """
    if form.name == "plain":
        (rollout,) = judged
        keywords = {"row": dict(rollout.columns), "messages": list(rollout.messages)}
        named = {name: keywords[name] for name in form.parameters}
        return [_awaited(function(rollout.request, rollout.completion, **named))]

    if form.name == "trl":
        returned = _awaited(function(**_trl_keywords(form, judged)))
    else:
        keywords = _verl_keywords(judged)
        if form.name == "verl":
            keywords = {name.removesuffix("s"): values[0] for name, values in keywords.items()}
            return [_of_dict(_awaited(function(**{name: keywords[name] for name in keywords if form.takes(name)})))]
        returned = _awaited(function(**{name: keywords[name] for name in keywords if form.takes(name)}))

    if isinstance(returned, str | bytes | Mapping) or not hasattr(returned, "__iter__"):
        raise TypeError(f"returned a {type(returned).__name__}; expected a list of {len(judged)} numbers")
    values = list(returned)
    if len(values) != len(judged):
        raise ValueError(f"returned {len(values)} values for {len(judged)} completions; expected as many")
    return [_of_dict(value) for value in values] if form.name == "verl_batched" else values


def _trl_keywords(form: Form, judged: Sequence[Judged]) -> dict[str, list[Any] | Callable[..., None]]:
    """Returns the arguments of TRL's form: lists as long as `judged`. A row without a column has None there."""

    def ignored(*values: Any, **named: Any) -> None:
        """Takes what a function would log beside its scores."""

    prompts: list[Any] = []
    completions: list[Any] = []
    for rollout in judged:
        if rollout.is_chat:
            prompts.append(list(rollout.messages))
            completions.append([{"role": "assistant", "content": rollout.completion}])
        else:
            prompts.append(rollout.columns[PROMPT])
            completions.append(rollout.completion)

    names = dict.fromkeys(name for rollout in judged for name in rollout.columns)
    keywords: dict[str, Any] = {name: [rollout.columns.get(name) for rollout in judged] for name in names}
    # A function may be called with a column that none of these rows has.
    keywords |= {name: [None] * len(judged) for name in form.columns - {*names}}
    keywords = {name: keywords[name] for name in keywords if name not in (PROMPT, "completion", "completion_ids")}
    keywords |= {"log_extra": ignored, "log_metric": ignored}
    keywords |= {"prompts": prompts, "completions": completions}
    keywords["completion_ids"] = [list(rollout.tokens) for rollout in judged]
    return {name: values for name, values in keywords.items() if form.takes(name)}


def _verl_keywords(judged: Sequence[Judged]) -> dict[str, list[Any]]:
    """Returns the arguments of verl's batched form. A row without `data_source` has an empty text there."""
    extra_infos = []
    for rollout in judged:
        extra_info = rollout.columns.get(EXTRA_INFO)
        more = {"num_turns": None, "rollout_reward_scores": {}}  # verl's reward managers add these two
        extra_infos.append(more | (dict(extra_info) if isinstance(extra_info, Mapping) else {}))
    return {
        "data_sources": [rollout.columns.get(DATA_SOURCE) or "" for rollout in judged],
        "solution_strs": [rollout.completion for rollout in judged],
        "ground_truths": [rollout.ground_truth for rollout in judged],
        "extra_infos": extra_infos,
    }


def _of_dict(value: Any) -> Any:
    """Returns the score of verl's form, which may be a dict with figures beside it."""
    if isinstance(value, Mapping) and "score" in value:
        return value["score"]
    return value


def _awaited(value: Any) -> Any:
    """Returns the value, of a coroutine its result."""
    if not inspect.isawaitable(value):
        return value

    # `asyncio.run` takes coroutines alone, and a value may be awaitable in another way.
    async def result() -> Any:
        return await value

    return asyncio.run(result())
