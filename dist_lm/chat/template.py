r"""Lays a conversation out, in tokens and as a chat template: ChatML turns with Hermes tool use, as in Qwen2.5.

    <|endoftext|>
    <|im_start|>system\nTEXT\n\nINTRODUCTION<tools>\nTOOL\nTOOL\n</tools>INSTRUCTION<|im_end|>\n
    <|im_start|>user\nTEXT<|im_end|>\n
    <|im_start|>assistant\nTEXT\n<tool_call>\nCALL\n</tool_call>\n<tool_call>\nCALL\n</tool_call><|im_end|>\n
    <|im_start|>user\n<tool_response>\nRESULT\n</tool_response><|im_end|>\n
    <|im_start|>assistant\n<think>\nTHINKING\n</think>\n\nTEXT<|im_end|>\n

Marks are added by their ids. All other text goes through `Tokenizer.encode`, which never returns the id of a mark, so
no text can forge one. A mark that an existing tokenizer lacks is plain text (`tokenizer.add_marks`), and so are
`<think>` and `</think>`. In JSON, a `<` that begins a mark is written `\u003c`, because parsers that read text, such as
vLLM's, end a call at the first `</tool_call>`. `dist_lm.chat.parse` reads the layout back.

An imported model may have another layout: `dist_lm.chat.kept_template`. The functions here that take a tokenizer use
it then.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from dist_lm.chat import json_text
from dist_lm.chat.messages import (
    BEGIN_THINKING,
    END_THINKING,
    ChatError,
    Conversation,
    Json,
    Message,
    Tool,
    check_conversation,
    check_message,
    turn_name,
)
from dist_lm.tokenizer.symbols import (
    CALL,
    END,
    END_CALL,
    END_OF_TEXT,
    END_RESPONSE,
    END_TOOLS,
    RESPONSE,
    SPECIAL_TOKENS,
    START,
    TOOLS,
)
from dist_lm.tokenizer.tokenizer import Tokenizer

FORMAT = 5  # counts changes of the layout in tokens: corpora of another format are refused

# These texts stand around the tools. They explain the marks without spelling one, so that no mark is there in vain.
INTRODUCTION = "# Tools\n\nYou may call these functions. Each line describes one as JSON:\n"
INSTRUCTION = '\n\nFor each call, write a JSON object with the keys "name" and "arguments" between the marks of a call.'


@dataclass(frozen=True)
class Part:
    """A mark, or the text between two marks."""

    text: str
    is_mark: bool = False
    is_answer: bool = False  # the assistant writes it, and the loss counts it
    context: int = 0  # characters at the beginning of an answer that the loss does not count


@dataclass(frozen=True)
class Rendered:
    """A conversation in tokens."""

    tokens: np.ndarray  # (n,) of the tokenizer's dtype
    loss_mask: np.ndarray  # (n,) uint8: 1 on what the assistant writes, up to and including <|im_end|>


def render(conversation: Conversation, tokenizer: Tokenizer) -> Rendered:
    """Returns the tokens of `conversation`, with every turn closed, and their loss mask.

    Tokens are (n,) of the tokenizer's dtype, end-of-text first. The mask is (n,) uint8, 1 in learned answers and the
    marks that end them; 0 in their thinking if that is not learned.

    Raises:
        ChatError: the conversation is not well formed, JSON cannot hold a value, or the template of an imported model
            refuses it; the message names the turn.
    """
    if tokenizer.kept_template:
        from dist_lm.chat import kept_template  # jinja2 is for imported models only

        return Rendered(*kept_template.render(conversation, tokenizer))

    tokens: list[int] = []
    loss_mask: list[int] = []
    for part in layout(conversation):
        part_ids = _encoded([part], tokenizer)
        # The whole part is encoded at once, so that the loss changes no token.
        num_context = common_length(part_ids, tokenizer.encode(part.text[: part.context])) if part.context else 0
        tokens += part_ids
        loss_mask += [0] * num_context + [int(part.is_answer)] * (len(part_ids) - num_context)
    return Rendered(np.array(tokens, tokenizer.dtype), np.array(loss_mask, np.uint8))


def prompt(conversation: Conversation, tokenizer: Tokenizer) -> list[int]:
    """Returns the ids that a model continues: those of `conversation`, then the beginning of the assistant's turn.

    The tokenizer's own first token stands in place of end-of-text; a template of an imported model writes its own.

    Raises:
        ChatError: for the reasons of `render`, or the last turn is not of user or tool.
    """
    check_conversation(conversation)
    # After a turn of its own the assistant has nothing to answer; a turn of the system may follow the question.
    number, last = next(turn for turn in reversed([*enumerate(conversation.messages)]) if turn[1].role != "system")
    if last.role not in ("user", "tool"):
        where = turn_name(number, last)
        raise ChatError(f"{where}: is last; expected a last turn of user or tool, which the assistant answers")
    if tokenizer.kept_template:
        from dist_lm.chat import kept_template  # jinja2 is for imported models only

        return kept_template.prompt(conversation, tokenizer)

    # Shards hold end-of-text; a model with a first token of its own has never seen a document without it.
    tokens = np.array(_encoded([*layout(conversation), *_opening("assistant")], tokenizer))
    return tokenizer.first_token.put(tokens).tolist()


def following(answered: Conversation, conversation: Conversation, tokenizer: Tokenizer) -> list[int] | None:
    """Returns the end of the `prompt` of `conversation`: the ids behind the mark that ends the last turn of `answered`.

    `conversation` must begin with the turns of `answered`. None if the template of an imported model writes these turns
    in another way when others follow, such as without their thinking.

    Raises:
        ChatError: for the reasons of `render`.
    """
    if tokenizer.kept_template:
        from dist_lm.chat import kept_template  # jinja2 is for imported models only

        return kept_template.following(answered, conversation, tokenizer)

    # The last part of a conversation is the line break behind its last mark.
    rest = layout(conversation)[len(layout(answered)) - 1 :]
    return _encoded([*rest, *_opening("assistant")], tokenizer)


def answer_tokens(message: Message, tokenizer: Tokenizer, conversation: Conversation | None = None) -> list[int]:
    """Returns the ids that the assistant writes after a `prompt`: text and calls, up to and including the turn's end.

    Args:
        message: a turn of the assistant; the caller makes sure.
        conversation: the conversation before `message`. Only the template of an imported model looks at it; None: a
            question of the user.

    Raises:
        ChatError: `message` is not well formed, JSON cannot hold the arguments of a call, or the template of an
            imported model refuses it.
    """
    check_message(message, "the assistant's turn")
    if tokenizer.kept_template:
        from dist_lm.chat import kept_template  # jinja2 is for imported models only

        return kept_template.answer_tokens(conversation or kept_template.PROBE, message, tokenizer)

    return _encoded(_answer(message, "the assistant's turn"), tokenizer)


def stop_tokens(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Returns the token ids that end a turn of the assistant; at least one.

    Raises:
        UserError: the tokenizer lacks the mark; ChatError, one of these: the template of an imported model ends turns
            without one, or refuses a plain conversation.
    """
    if tokenizer.kept_template:
        from dist_lm.chat import kept_template  # jinja2 is for imported models only

        return kept_template.stop_tokens(tokenizer)

    return (tokenizer.mark_id(END),)


def layout(conversation: Conversation) -> list[Part]:
    """Returns the parts of `conversation`; their concatenated texts are what `chat_template` renders.

    Raises:
        ChatError: for the reasons of `render`.
    """
    check_conversation(conversation)
    messages = conversation.messages
    parts = [_mark(END_OF_TEXT)]

    # Tools stand in the system turn, so there is one even if the system says nothing.
    if conversation.tools or messages[0].role == "system":
        system_text = messages[0].content if messages[0].role == "system" else ""
        parts += _system_turn(system_text, conversation.tools)

    for number, message in enumerate(messages):
        where = turn_name(number, message)
        if message.role == "user":
            parts += [_mark(START), Part(f"user\n{message.content}"), _mark(END), Part("\n")]
        elif message.role == "system" and number > 0:
            parts += _system_turn(message.content, ())
        elif message.role == "assistant":
            parts += [*_opening("assistant"), *_answer(message, where), Part("\n")]
        elif message.role == "tool":
            parts += [_mark(START), Part("user\n"), *_results(message.results, where), _mark(END), Part("\n")]
    return parts


def last_request(text: str) -> str:
    """Returns the last text of the user in the text of a rendered conversation, for samples that people read."""
    return text.rpartition(f"{START}user\n")[2].partition(END)[0]


def chat_template() -> str:
    """Returns the same layout as a Jinja template for `transformers.PreTrainedTokenizer.apply_chat_template`.

    Messages and tools have the form of OpenAI's API. The content of a message of role tool is JSON text or a value. The
    template opens with our end-of-text.
    """
    template = TEMPLATE
    for name, value in {
        "MARKS": json.dumps(SPECIAL_TOKENS),
        "INTRODUCTION": json.dumps(INTRODUCTION),
        "INSTRUCTION": json.dumps(INSTRUCTION),
    }.items():
        template = template.replace(name, value)
    return template


def _system_turn(text: str, tools: Sequence[Tool]) -> list[Part]:
    """Returns the parts of the system turn, with the tools behind the text `text`, which may be empty.

    Raises:
        ChatError: JSON cannot hold a tool; the message names it.
    """
    # Each tool is on a line of its own, so that a reader of text can split them.
    parts = [_mark(START)]
    if tools:
        lines = [_json(_tool_value(tool), f"tool {number}") for number, tool in enumerate(tools)]
        introduction = f"{text}\n\n{INTRODUCTION}" if text else INTRODUCTION
        parts += [Part(f"system\n{introduction}"), _mark(TOOLS), Part("".join(f"\n{line}" for line in lines) + "\n")]
        parts += [_mark(END_TOOLS), Part(INSTRUCTION)]
    else:
        parts.append(Part(f"system\n{text}"))
    return [*parts, _mark(END), Part("\n")]


def _tool_value(tool: Tool) -> Json:
    function = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    return {"type": "function", "function": function}


def _answer(message: Message, where: str) -> list[Part]:
    """Returns the parts that the assistant writes: thinking, text, calls, and the mark that ends the turn. They are
    marked as answer where the loss counts them.

    Raises:
        ChatError: JSON cannot hold the arguments of a call; the message begins with `where`.
    """
    learn = message.learn
    parts: list[Part] = []
    thinking = thinking_block(message)
    text = thinking + message.content
    context = 0 if message.learn_thinking else len(thinking)
    for number, call in enumerate(message.calls):
        # The model itself writes the line break before a call; thinking ends with one.
        if number or message.content:
            parts.append(Part(f"{text}\n", is_answer=learn, context=context))
        elif thinking:
            parts.append(Part(thinking, is_answer=learn, context=context))
        call_json = _json({"name": call.name, "arguments": call.arguments}, f"{where}, call {number}")
        parts += [_mark(CALL, learn), Part(f"\n{call_json}\n", is_answer=learn), _mark(END_CALL, learn)]
        text, context = "", 0
    return [*parts, Part(text, is_answer=learn, context=context), _mark(END, learn)]


def thinking_block(message: Message) -> str:
    """Returns the thinking of a turn as the text before its content; empty if it has none."""
    if not message.thinking:
        return ""
    return f"{BEGIN_THINKING}\n{message.thinking}\n{END_THINKING}\n\n"


def common_length(ids: Sequence[int], other_ids: Sequence[int]) -> int:
    """Returns how many first ids both have in common."""
    pairs = zip(ids, other_ids, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(ids), len(other_ids)))


def _results(results: Sequence[Json], where: str) -> list[Part]:
    parts: list[Part] = []
    for number, result in enumerate(results):
        result_json = _json(result, f"{where}, result {number}")
        if parts:
            parts.append(Part("\n"))
        parts += [_mark(RESPONSE), Part(f"\n{result_json}\n"), _mark(END_RESPONSE)]
    return parts


def _opening(role: str) -> list[Part]:
    return [_mark(START), Part(f"{role}\n")]


def _mark(name: str, is_answer: bool = False) -> Part:
    return Part(name, is_mark=True, is_answer=is_answer)


def _json(value: Json, where: str) -> str:
    """Returns `value` as JSON that spells no mark."""
    text = json_text.write(value, where)
    # Parsers of text would read a mark inside a string as a mark.
    if "<" in text:
        for mark in SPECIAL_TOKENS:
            text = text.replace(mark, f"\\u003c{mark[1:]}")
    return text


def _encoded(parts: Iterable[Part], tokenizer: Tokenizer) -> list[int]:
    tokens: list[int] = []
    for part in parts:
        tokens += tokenizer.mark(part.text) if part.is_mark else tokenizer.encode(part.text)
    return tokens


TEMPLATE = r"""
{%- macro without_marks(text) %}
    {%- set found = namespace(text=text) %}
    {%- if '<' in text %}
        {%- for mark in MARKS %}
            {%- set found.text = found.text.replace(mark, '\\u003c' + mark[1:]) %}
        {%- endfor %}
    {%- endif %}
    {{- found.text }}
{%- endmacro %}
{{- '<|endoftext|>' }}
{%- set system = '' %}
{%- if messages and messages[0].role == 'system' %}
    {%- set system = messages[0].content %}
{%- endif %}
{%- if tools or system %}
    {{- '<|im_start|>system\n' + system }}
    {%- if tools %}
        {{- ('\n\n' if system else '') + INTRODUCTION + '<tools>' }}
        {%- for tool in tools %}
            {{- '\n' + without_marks(tool | tojson) }}
        {%- endfor %}
        {{- '\n</tools>' + INSTRUCTION }}
    {%- endif %}
    {{- '<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- set thinking = '' %}
        {%- if message.reasoning_content %}
            {%- set thinking = '<think>\n' + message.reasoning_content + '\n</think>\n\n' %}
        {%- endif %}
        {{- '<|im_start|>assistant\n' + thinking + (message.content or '') }}
        {%- for call in message.tool_calls or [] %}
            {%- set call = call.function if call.function is defined else call %}
            {{- '' if loop.first and not message.content else '\n' }}
            {{- '<tool_call>\n{"name": ' + without_marks(call.name | tojson) + ', "arguments": ' }}
            {{- without_marks(call.arguments if call.arguments is string else call.arguments | tojson) }}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user' if loop.first or messages[loop.index0 - 1].role != 'tool' else '' }}
        {{- '\n<tool_response>\n' }}
        {{- without_marks(message.content if message.content is string else message.content | tojson) }}
        {{- '\n</tool_response>' }}
        {{- '<|im_end|>\n' if loop.last or messages[loop.index0 + 1].role != 'tool' else '' }}
    {%- elif message.role != 'system' or not loop.first %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""
