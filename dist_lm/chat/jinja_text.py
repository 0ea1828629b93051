"""A conversation as the text that a Jinja chat template makes of it, in a sandbox, as transformers renders it."""

import json
import math
import re
from collections.abc import Sequence
from datetime import date
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from dist_lm.chat import json_text
from dist_lm.chat.messages import Call, ChatError, Conversation, Json, Message, Tool, turn_name
from dist_lm.tokenizer.tokenizer import KeptTemplate

# a tag of transformers around what the assistant writes
GENERATION = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")
WAY_OUT = "tokenizer.chat_template=ours lays conversations out as dist_lm does"
MOST_STEPS = 1_000_000  # of a rendering; 1,000 turns that each look at all turns take as many
LONGEST, LARGEST = 10_000_000, 10**30  # a repeated text or list, and a product
MOST_DIGITS = 10_000  # base x exponent of a power: above the digits that it has
STEPS = "steps taken"  # variable of a rendering that no template can name, as it has a space
FAILURES = (
    *(jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError),
    *(ArithmeticError, RecursionError, MemoryError),
)
"""What a rendering raises."""
PROBE = Tool("probe_tool", "probe_text", {"type": "object", "properties": {"x": {"type": "integer"}}})
PROBE_CALL = Call(PROBE.name, {"x": 7})


def text_of(conversation: Conversation, kept: KeptTemplate, texts_as_json: bool = False) -> str:
    """The rendered text, as transformers renders it. `texts_as_json`: see `messages_of`.

    Raises:
        ChatError: the template refuses the conversation.
    """
    return rendered(kept, messages_of(conversation.messages, texts_as_json), tools_of(conversation.tools), False)


def messages_of(messages: Sequence[Message], texts_as_json: bool = False) -> list[dict[str, Any]]:
    """The turns in OpenAI's format. A result that is a text is its content, as JSON if asked for; any other is JSON."""
    found: list[dict[str, Any]] = []
    for number, message in enumerate(messages):
        if message.role == "tool":
            calls = messages[number - 1].calls
            for place, result in enumerate(message.results):
                plain = isinstance(result, str) and not texts_as_json
                content = result if plain else json_text.write(result, turn_name(number, message))
                found.append(
                    {
                        "role": "tool",
                        "name": calls[place].name,
                        "tool_call_id": _call_id(number - 1, place),
                        "content": content,
                    }
                )
            continue
        one: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.calls:
            one["tool_calls"] = [
                {
                    "type": "function",
                    "id": _call_id(number, place),
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for place, call in enumerate(message.calls)
            ]
        found.append(one)
    return found


def _call_id(turn: int, place: int) -> str:
    """Nine letters or digits, which some templates ask for."""
    return f"call{turn % 1000:03d}{place % 100:02d}"


def tools_of(tools: Sequence[Tool]) -> list[dict[str, Any]] | None:
    return [
        {
            "type": "function",
            "function": {"name": one.name, "description": one.description, "parameters": one.parameters},
        }
        for one in tools
    ] or None


@lru_cache(maxsize=8)
def _check_shows(kept: KeptTemplate) -> tuple[bool, bool, bool]:
    """Whether the template shows tools, calls and results, by a probe."""
    turns = (
        Message("user", "probe"),
        Message("assistant", calls=(PROBE_CALL,)),
        Message("tool", results=("probe_result",)),
        Message("assistant", "probe_end"),
    )
    found = []
    for tools, texts in (((PROBE,), [PROBE.name]), ((), [PROBE.name]), ((), ["probe_result"])):
        shown = turns[:1] if tools else turns
        try:
            whole = rendered(kept, messages_of(shown), tools_of(tools), False)
        except ChatError:
            whole = ""
        found.append(all(text in whole for text in texts))
    return found[0], found[1], found[2]


def check_probes(kept: KeptTemplate, conversation: Conversation) -> None:
    tools, calls, results = _check_shows(kept)
    for has, shown, what in (
        (bool(conversation.tools), tools, "tools"),
        (any(message.calls for message in conversation.messages), calls, "calls"),
        (any(message.results for message in conversation.messages), results, "results of calls"),
    ):
        if has and not shown:
            raise ChatError(
                f"the conversation has {what}, which the chat template of the model does not show: {WAY_OUT}"
            )


def rendered(kept: KeptTemplate, messages: Any, tools: Any, opening: bool) -> str:
    try:
        return _compiled(kept).render(
            messages=messages,
            tools=tools,
            documents=None,
            add_generation_prompt=opening,
            **dict(kept.special_tokens),
            **{STEPS: [0]},
        )
    except FAILURES as error:
        reason = " ".join(str(error).split())
        raise ChatError(f"the chat template of the model refuses the conversation ({reason}): {WAY_OUT}") from error


class _Namespace(Namespace):
    """`namespace` of Jinja without names that begin with an underscore, as in transformers."""

    def __init__(self, **named: Any) -> None:
        super().__init__()
        for name, value in named.items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"{name} is not a name of a namespace")
        super().__setitem__(name, value)


@jinja2.pass_context
def _step(context: Context, _: None) -> None:
    """One more turn of a loop, or call of a macro."""
    taken = context.parent[STEPS]
    taken[0] += 1
    if taken[0] > MOST_STEPS:
        raise jinja2.exceptions.SecurityError(f"it takes more than {MOST_STEPS:,} turns of loops and calls")


def _size(value: Any) -> float:
    if isinstance(value, str | list | tuple):
        return len(value)
    return abs(value) if isinstance(value, int | float) else 1


class _Bounded(ImmutableSandboxedEnvironment):
    """A sandbox whose renderings end: it counts the turns of loops and the calls of macros, so that the same template
    is refused on every machine, however busy that is. Memory is bounded for products and powers only."""

    intercepted_binops = frozenset(("*", "**"))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        size = math.prod(_size(one) for one in (left, right))
        repeats = any(isinstance(one, str | list | tuple) for one in (left, right))
        if size > (LONGEST if repeats else LARGEST) or (operator == "**" and size > MOST_DIGITS):
            raise jinja2.exceptions.SecurityError(f"{operator} makes a value that is too large")
        return super().call_binop(context, operator, left, right)

    def counted(self, source: str) -> nodes.Template:
        """The template with a `_step` in each loop and macro, as a filter: the sandbox does not check those again."""
        self.filters[STEPS] = _step
        tree = self.parse(source)
        for block in tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock)):
            step = nodes.ExprStmt(nodes.Filter(nodes.Const(None), STEPS, [], [], None, None))
            block.body.insert(0, step.set_lineno(block.lineno).set_environment(self))
        return tree


@lru_cache(maxsize=8)
def _compiled(kept: KeptTemplate) -> jinja2.Template:
    """The template, compiled in a sandbox with the filters and functions of transformers.

    `strftime_now` gives the day of the import, so that the same conversation always has the same tokens.
    """

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Json,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = _Bounded(trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": date.fromisoformat(kept.day).strftime,
        "namespace": _Namespace,
        "dict": lambda *pairs, **named: dict(*pairs, **named),
    }
    source = GENERATION.sub(lambda tag: f"{{%{tag[1]} {'endif' if tag[2] else 'if true'} {tag[3]}%}}", kept.text)
    try:
        return environment.from_string(environment.counted(source))
    except (jinja2.TemplateError, RecursionError) as error:
        raise ChatError(f"the chat template of the model cannot be read ({error}): {WAY_OUT}") from error
