"""Renders a conversation by a Jinja chat template to the text that transformers would make of it.

A template is a program of somebody else. Jinja's sandbox keeps it from Python; a process with limits of time and memory
(`dist_lm.sandbox.limited`) keeps it from this process, whose answers it waits for.
"""

import json
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
from dist_lm.chat.messages import (
    BEGIN_THINKING,
    END_THINKING,
    Call,
    ChatError,
    Conversation,
    Json,
    Message,
    Tool,
    turn_name,
)
from dist_lm.sandbox import limited
from dist_lm.tokenizer.tokenizer import KeptTemplate

# transformers has this tag around what the assistant writes.
GENERATION = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")
WAY_OUT = "tokenizer.chat_template=ours lays conversations out as dist_lm does"
# All beginnings in one request have at most so many turns: its time limit must not depend on the length of a
# conversation.
MOST_TURNS = 4096
MOST_STEPS = 1_000_000  # steps of a rendering; 1,000 turns that each look at all turns take as many
LONGEST, LARGEST = 10_000_000, 10**30  # bounds of a repeated text or list, and of a product
MOST_DIGITS = 10_000  # bound of base x exponent of a power, which is more than its digits
STEPS = "steps taken"  # variable of a rendering that no template can name, as it has a space
ERRORS = (
    *(jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError),
    *(ArithmeticError, RecursionError),
)
"""Exceptions that a rendering raises."""
PROBE = Tool("probe_tool", "probe_text", {"type": "object", "properties": {"x": {"type": "integer"}}})
PROBE_CALL = Call(PROBE.name, {"x": 7})


class TemplateLimitError(ChatError):
    """Raised for a template that takes more time or memory than the process with limits has, or ends it."""


def text_of(conversation: Conversation, template: KeptTemplate, texts_as_json: bool = False) -> str:
    """Returns the text that transformers would render. `texts_as_json` is that of `messages_of`.

    Raises:
        ChatError: the template refuses the conversation.
    """
    return rendered(template, messages_of(conversation.messages, texts_as_json), tools_of(conversation.tools), False)


def messages_of(messages: Sequence[Message], texts_as_json: bool = False) -> list[dict[str, Any]]:
    """Returns the turns in OpenAI's format, with a message for each result of a call; thinking is `reasoning_content`.

    The content of a result is JSON, but a text stays as it is unless `texts_as_json` is set. Ids of calls are made from
    their place. The turns must be well formed, a turn of results behind its calls; arguments are not copied.

    Raises:
        ChatError: JSON cannot express a result.
    """
    openai_messages: list[dict[str, Any]] = []
    for number, message in enumerate(messages):
        # A turn has all results; each becomes a message, which names its call.
        if message.role == "tool":
            calls = messages[number - 1].calls
            for index, result in enumerate(message.results):
                content = result
                if texts_as_json or not isinstance(result, str):
                    content = json_text.write(result, turn_name(number, message))
                openai_messages.append(
                    {
                        "role": "tool",
                        "name": calls[index].name,
                        "tool_call_id": _call_id(number - 1, index),
                        "content": content,
                    }
                )
            continue

        openai_message: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.thinking:
            openai_message["reasoning_content"] = message.thinking
        if message.calls:
            openai_message["tool_calls"] = [
                {
                    "type": "function",
                    "id": _call_id(number, index),
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for index, call in enumerate(message.calls)
            ]
        openai_messages.append(openai_message)
    return openai_messages


def with_thinking_in_text(openai_messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the messages with their thinking as a block before the text, for templates without a key for it."""
    messages = []
    for message in openai_messages:
        thinking = message.get("reasoning_content")
        if thinking:
            message = {key: value for key, value in message.items() if key != "reasoning_content"}
            message["content"] = f"{BEGIN_THINKING}\n{thinking}\n{END_THINKING}\n\n{message['content']}"
        messages.append(message)
    return messages


def _call_id(turn: int, call: int) -> str:
    """Returns nine letters or digits, which some templates ask for."""
    return f"call{turn % 1000:03d}{call % 100:02d}"


def tools_of(tools: Sequence[Tool]) -> list[dict[str, Any]] | None:
    """Returns the tools in OpenAI's format; None: there are none, which templates ask for."""
    return [
        {
            "type": "function",
            "function": {"name": tool.name, "description": tool.description, "parameters": tool.parameters},
        }
        for tool in tools
    ] or None


@lru_cache(maxsize=8)
def _shows(template: KeptTemplate) -> tuple[bool, bool, bool]:
    """Returns whether the template shows (tools, calls, results), by rendering probes. Cached.

    A probe that the template refuses counts as not shown.

    Raises:
        TemplateLimitError: the template exceeds a limit.
    """
    turns = (
        Message("user", "probe"),
        Message("assistant", calls=(PROBE_CALL,)),
        Message("tool", results=("probe_result",)),
        Message("assistant", "probe_end"),
    )

    def is_shown(probe: str, tools: tuple[Tool, ...]) -> bool:
        # With tools only the question: a template may have a tool's name from its call.
        probe_turns = turns[:1] if tools else turns
        try:
            return probe in rendered(template, messages_of(probe_turns), tools_of(tools), False)
        except TemplateLimitError:
            raise  # the other probes would take as long
        except ChatError:
            return False

    return is_shown(PROBE.name, (PROBE,)), is_shown(PROBE.name, ()), is_shown("probe_result", ())


@lru_cache(maxsize=8)
def shown_thinking(template: KeptTemplate) -> tuple[bool, bool, bool]:
    """Returns (whether the template shows thinking, whether in the text of the answer only, whether it still shows that
    of earlier answers when others follow), by rendering probes. Cached.

    Raises:
        TemplateLimitError: the template exceeds a limit.
    """
    turns = (
        Message("user", "probe"),
        Message("assistant", "probe_end", thinking="probe_thought"),
        Message("user", "probe_next"),
        Message("assistant", "probe_last"),
    )

    def is_shown(count: int, in_text: bool) -> bool:
        messages = messages_of(turns[:count])
        if in_text:
            messages = with_thinking_in_text(messages)
        try:
            return "probe_thought" in rendered(template, messages, None, False)
        except TemplateLimitError:
            raise  # the other probes would take as long
        except ChatError:
            return False

    for in_text in (False, True):
        if is_shown(2, in_text):
            return True, in_text, is_shown(4, in_text)
    return False, False, False


def check_probes(template: KeptTemplate, conversation: Conversation) -> None:
    """Refuses a conversation with tools, calls, results or thinking that the template leaves out; returns nothing.

    Raises:
        ChatError: names what the template leaves out.
    """
    # Without this a model would be trained and asked on conversations of which a part is missing.
    if any(message.thinking for message in conversation.messages) and not shown_thinking(template)[0]:
        raise ChatError(
            "the conversation has thinking, which the chat template of the model does not show: `thinking: drop` in "
            f"the source reads it without, or {WAY_OUT}"
        )
    shows_tools, shows_calls, shows_results = _shows(template)
    for is_there, is_shown, parts in (
        (bool(conversation.tools), shows_tools, "tools"),
        (any(message.calls for message in conversation.messages), shows_calls, "calls"),
        (any(message.results for message in conversation.messages), shows_results, "results of calls"),
    ):
        if is_there and not is_shown:
            raise ChatError(
                f"the conversation has {parts}, which the chat template of the model does not show: {WAY_OUT}"
            )


def rendered(template: KeptTemplate, messages: Any, tools: Any, opening: bool) -> str:
    """Returns the text of messages and tools in OpenAI's format. Special tokens are their names in the text.

    Args:
        messages: those of `messages_of`.
        tools: those of `tools_of`; None: none.
        opening: adds the beginning of the assistant's turn.

    Raises:
        ChatError: the template cannot be read, refuses the conversation or fails, or takes more than `MOST_STEPS`
            turns of loops and calls of macros, or more time or memory than the process with limits has.
    """
    return rendered_page(template, messages, tools, opening, ())[0]


def rendered_page(
    template: KeptTemplate, messages: Any, tools: Any, opening: bool, beginnings: Sequence[int]
) -> tuple[str, list[int | None]]:
    """Returns the text of `rendered`, and for each of `beginnings` the length of the text of so many first messages
    with the opening of the assistant's turn; None where that is no beginning of the whole text.

    The process with limits (`dist_lm.sandbox.limited`) renders, a conversation of up to 60 turns in one request.

    Raises:
        ChatError: as `rendered`.
    """
    text = ""
    lengths: list[int | None] = []
    step = max(1, MOST_TURNS // max(1, len(messages)))
    for first in range(0, max(1, len(beginnings)), step):
        part = list(beginnings[first : first + step])
        special_tokens = dict(template.special_tokens)
        try:
            text, part_lengths = limited.call(
                *(render_page, template.text, special_tokens, template.day, MOST_STEPS),
                *(messages, tools, opening, part),
            )
        except limited.LimitError as error:
            raise TemplateLimitError(f"the chat template of the model {error}: {WAY_OUT}") from error
        lengths += part_lengths
    return text, lengths


def render_page(
    text: str,
    special_tokens: dict[str, str],
    day: str,
    most_steps: int,
    messages: Any,
    tools: Any,
    opening: bool,
    beginnings: Sequence[int],
) -> tuple[str, list[int | None]]:
    """Does what `rendered_page` says, in the process with limits. `text`, `special_tokens` and `day` are the template.

    Raises:
        ChatError: as `rendered`.
    """
    template = KeptTemplate(text, tuple(sorted(special_tokens.items())), day)
    page = _rendered(template, messages, tools, opening, most_steps)
    lengths: list[int | None] = []
    for count in beginnings:
        beginning = _rendered(template, messages[:count], tools, True, most_steps)
        lengths.append(len(beginning) if page.startswith(beginning) else None)
    return page, lengths


def _rendered(template: KeptTemplate, messages: Any, tools: Any, opening: bool, most_steps: int) -> str:
    """Does what `rendered` says, in this process.

    Args:
        most_steps: steps that the template may take.

    Raises:
        ChatError: the template cannot be read, or refuses the conversation.
        TemplateLimitError: the template takes too much memory.
    """
    try:
        return _compiled(template).render(
            messages=messages,
            tools=tools,
            documents=None,
            add_generation_prompt=opening,
            **dict(template.special_tokens),
            **{STEPS: [0, most_steps]},
        )
    except ChatError:
        raise  # the template cannot be read
    except MemoryError as error:
        raise TemplateLimitError(f"the chat template of the model takes too much memory: {WAY_OUT}") from error
    except ERRORS as error:
        reason = " ".join(str(error).split())
        raise ChatError(f"the chat template of the model refuses the conversation ({reason}): {WAY_OUT}") from error


class _Namespace(Namespace):
    """`namespace` of Jinja without names that begin with an underscore, as in transformers."""

    def __init__(self, **named: Any) -> None:
        # Jinja's own constructor would set the names without a check.
        super().__init__()
        for name, value in named.items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"{name} is not a name of a namespace")
        super().__setitem__(name, value)


@jinja2.pass_context
def _step(context: Context, _: None) -> None:
    """Counts a turn of a loop or a call of a macro."""
    steps = context.parent[STEPS]  # a list, which a filter can change: steps taken, and the most
    steps[0] += 1
    if steps[0] > steps[1]:
        raise jinja2.exceptions.SecurityError(f"it takes more than {steps[1]:,} turns of loops and calls")


def _size(value: Any) -> float:
    """Returns the length of a text or list, the magnitude of a number, 1 for anything else."""
    if isinstance(value, str | list | tuple):
        return len(value)
    if isinstance(value, int | float):
        return abs(value)
    return 1


class _Bounded(ImmutableSandboxedEnvironment):
    """A sandbox whose renderings end: it counts the turns of loops and the calls of macros, so that the same template
    is refused on every machine, however busy that is. Memory is bounded for products and powers only: the process
    with limits bounds the rest."""

    intercepted_binops = frozenset(("*", "**"))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Computes an operation between two values of a template.

        Raises:
            SecurityError: the result may be too large; the operation is not executed.
        """
        # Such an operation takes memory and time without a loop that could be counted.
        size = _size(left) * _size(right)
        largest = LARGEST
        if isinstance(left, str | list | tuple) or isinstance(right, str | list | tuple):
            largest = LONGEST
        if size > largest or (operator == "**" and size > MOST_DIGITS):
            raise jinja2.exceptions.SecurityError(f"{operator} makes a value that is too large")
        return super().call_binop(context, operator, left, right)

    def counted(self, source: str) -> nodes.Template:
        """Returns the parsed template with a `_step` in each loop and macro.

        The step is a filter of the environment, because the sandbox does not check filters again.

        Raises:
            jinja2.TemplateError: the template is no Jinja.
        """
        self.filters[STEPS] = _step
        tree = self.parse(source)
        for block in tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock)):
            step = nodes.ExprStmt(nodes.Filter(nodes.Const(None), STEPS, [], [], None, None))
            block.body.insert(0, step.set_lineno(block.lineno).set_environment(self))
        return tree


@lru_cache(maxsize=8)
def _compiled(template: KeptTemplate) -> jinja2.Template:
    """Returns the template, compiled in a sandbox with the filters and functions of transformers. Cached.

    `strftime_now` gives the day of the import, so that the same conversation always has the same tokens.

    Raises:
        ChatError: the template is no Jinja.
    """

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    # Jinja's own `tojson` escapes characters for HTML.
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
    del environment.globals["lipsum"]  # random words without end, which no layout can have
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": date.fromisoformat(template.day).strftime,
        "namespace": _Namespace,
        "dict": lambda *pairs, **named: dict(*pairs, **named),
    }

    # The tag changes no text, and plain Jinja does not know it.
    source = GENERATION.sub(lambda tag: f"{{%{tag[1]} {'endif' if tag[2] else 'if true'} {tag[3]}%}}", template.text)
    try:
        return environment.from_string(environment.counted(source))
    except (jinja2.TemplateError, RecursionError) as error:
        raise ChatError(f"the chat template of the model cannot be read ({error}): {WAY_OUT}") from error
