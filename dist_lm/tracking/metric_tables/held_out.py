"""Metrics of held-out documents, of the samples of stage code, and of the calls of stage tools."""

from dist_lm.tracking.metric import LOOP_STAGES, TEXT_STAGES, Better, Metric

LOSSES = (
    Metric(
        "val/loss",
        "nats/target",
        "Loss on held-out documents, a token; in stage reward on held-out rankings, a choice.",
        "lower",
        LOOP_STAGES,
        "held-out",
    ),
    Metric(
        "val/loss_{corpus}",
        "nats/target",
        "The same on one part: a language, a corpus that is mixed in, or a source of rankings.",
        "lower",
        LOOP_STAGES,
        "held-out",
    ),
    Metric(
        "val/bits_per_byte",
        "bits/byte",
        "Loss on held-out documents for each UTF-8 byte of their text: comparable between tokenizers.",
        "lower",
        TEXT_STAGES,
        "held-out",
    ),
    Metric(
        "val/bits_per_byte_{corpus}",
        "bits/byte",
        "The same on one part: a language, or a corpus that is mixed in.",
        "lower",
        TEXT_STAGES,
        "held-out",
    ),
)
CODE = (
    Metric(
        "code/parses_{language}",
        "",
        "Share of samples, prompt included, that the parser of their language accepts.",
        "higher",
        ("code",),
        "code",
        only="with samples in a language whose parser is there",
    ),
)
CALLED = "with questions in which a call is expected"
WORDS = "with questions in which no call is expected"


def _calls(name: str, meaning: str, better: Better, only: str, by_kind: bool = True) -> tuple[Metric, ...]:
    """A share over all questions, and over those of one kind."""
    family = "The same over one kind of conversation."
    whole = Metric(f"tools/{name}", "", meaning, better, ("tools",), "tools", only)
    return (
        (whole, Metric(f"tools/{name}_{{kind}}", "", family, better, ("tools",), "tools", only))
        if by_kind
        else (whole,)
    )


TOOLS = (
    *_calls("parses", "Share of turns that parse and hold a call, where one is expected.", "higher", CALLED),
    *_calls("valid_call", "Share of turns whose calls all fit a tool that was offered.", "higher", CALLED),
    *_calls("name_exact", "Share of turns that call the expected tools, as often as expected.", "higher", CALLED),
    *_calls("args_exact", "Share of expected calls that were made with the same arguments.", "higher", CALLED),
    *_calls("call_exact", "Share of turns whose calls are those expected, no more and no less.", "higher", CALLED),
    *_calls("false_refusals", "Share of turns that answer in words where a call is expected.", "lower", CALLED),
    *_calls(
        "parallel_exact",
        "Share of turns whose calls are those expected, where several are.",
        "higher",
        "with questions in which several calls are expected",
        by_kind=False,
    ),
    *_calls("irrelevance", "Share of turns that answer in words where no call is expected.", "higher", WORDS),
)
HELD_OUT = (*LOSSES, *CODE, *TOOLS)
