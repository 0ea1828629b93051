"""Chat templates are programs of somebody else: each renders a text or is refused by one line, in bounded time."""

import time
from random import Random

import pytest

from dist_lm.chat.jinja_text import TemplateLimitError, messages_of, rendered, tools_of
from dist_lm.chat.messages import ChatError, Message, Tool
from dist_lm.chat.template import chat_template
from dist_lm.sandbox import limited
from dist_lm.sandbox.limited import process_id
from dist_lm.tokenizer.tokenizer import KeptTemplate
from tests.chat.test_kept_template import ADDS_SYSTEM, HERMES, TRIMS, WITHOUT_HEADER
from tests.patience import patient

the_bar = pytest.param(10_000, marks=[pytest.mark.bars, pytest.mark.timeout(7200)])
LIMIT_S = 10.0
MESSAGES = messages_of([Message("user", "a"), Message("assistant", "b"), Message("user", "c")])
TOOLS = tools_of([Tool("f", "does", {"type": "object", "properties": {"x": {"type": "integer"}}})])
PIECES = (
    *("{{ lipsum(n=10**9) }}", "{{ x }}", "{% endfor %}", "{% endif %}", "{% if 1 %}", "{%", "}}", "|tojson"),
    *("{% set messages = messages + messages %}", "{% for x in range(99999) %}", "{% for x in messages %}"),
    *("{{ messages|map('string')|map('list')|list }}", "{{ range(99999)|map('string')|map('list')|list }}"),
    *("{% macro f(x) %}{{ f(x ~ x) }}{% endmacro %}{{ f('a') }}", "{{ messages|tojson(indent=10**8) }}"),
    *("{% set n = namespace(x='a') %}", "{% set n.x = n.x ~ n.x %}", "{{ raise_exception('no') }}"),
    *("{{ 'a'|center(10**9) }}", "{{ '%999999999d' % 1 }}", "{{ ''.__class__ }}", "{{ " + "(" * 400 + "1"),
)


def outcome(text: str) -> str | None:
    """The text of a rendering; None: refused, in one line. Any other error ends the test."""
    started = time.monotonic()
    try:
        return rendered(KeptTemplate(text, (("bos_token", "<s>"),), "2026-01-31"), MESSAGES, TOOLS, True)
    except ChatError as error:
        message = str(error)
    finally:
        assert time.monotonic() - started < patient(LIMIT_S)
    assert len(message.splitlines()) == 1
    assert message.startswith("the chat template of the model ")
    return None


@pytest.mark.parametrize(
    "text",
    [
        "{{ lipsum(n=10**9) }}",
        "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
        "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "{{ [1]|batch(10**9, 1)|list }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ 'a'|center(10**9) }}",
        "{{" + "(" * 50_000 + "1" + ")" * 50_000 + "}}",
    ],
)
def test_a_template_that_took_all_memory_or_time_is_refused(text: str) -> None:
    """Only products and turns of loops were bounded."""
    assert outcome(text) is None


@pytest.mark.heavy
def test_maps_without_a_loop_that_could_be_counted_end_by_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limited, "CPU_S", 1)
    maps = "range(99999)|map('string')|map('list')|map('join')|list|length"
    template = KeptTemplate("{% for a in range(999) %}{{ " + maps + " }}{% endfor %}", (), "2026-01-31")
    with pytest.raises(TemplateLimitError, match="takes more than 1 s of CPU time"):
        rendered(template, MESSAGES, None, False)


@pytest.mark.parametrize("count", [300, the_bar])
def test_damaged_templates_render_or_are_refused(count: int) -> None:
    random = Random(5)
    seeds = (chat_template(), ADDS_SYSTEM, TRIMS, WITHOUT_HEADER, HERMES)
    shown = 0
    for _ in range(count):
        text = random.choice(seeds)
        for _ in range(random.choice((1, 1, 2, 4))):
            place, length = random.randrange(len(text)), random.choice((0, 0, 1, 5, 50))
            text = text[:place] + random.choice((*PIECES, "", "\x00", "\ud800")) + text[place + length :]
        shown += outcome(text) is not None
    assert 0 < shown < count


def test_renderings_share_a_process() -> None:
    """A process for each conversation would take a hundred times as long."""
    template = KeptTemplate(ADDS_SYSTEM, (), "2026-01-31")
    rendered(template, MESSAGES, None, True)
    first = process_id()
    for _ in range(50):
        rendered(template, MESSAGES, None, True)
    assert process_id() == first is not None
