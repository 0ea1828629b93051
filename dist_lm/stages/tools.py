"""Stage `tools`: stage sft from the checkpoint of stage code, with a share of text, and other questions.

Before the first step and after the last it answers questions about conversations of val, all with tools that are not
in the training data.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from dist_lm.config.root import Config
from dist_lm.config.stage import StageConfig
from dist_lm.errors import require
from dist_lm.stages.corpus_forms import CorpusFormsConfig
from dist_lm.stages.sft import Sft
from dist_lm.stages.stage import BITS_PER_BYTE, VAL_LOSS, KeyFigure
from dist_lm.stages.training.arguments import EvaluationArguments
from dist_lm.stages.training.stage import before_and_after, last_samples
from dist_lm.storage.run_directory import RunDirectory
from dist_lm.tracking.readable import percent

if TYPE_CHECKING:
    from dist_lm.evaluation.tool_questions import Asked
    from dist_lm.evaluation.tool_score import Verdict
    from dist_lm.generation.request import Answer, Request
    from dist_lm.tokenizer.tokenizer import Tokenizer
    from dist_lm.tracking.console import Console

log = logging.getLogger(__name__)

ROOM = 32  # tokens that an answer may have beyond twice those of the right answer
NO_QUESTIONS = (
    "no questions are asked: conversations in the chat template of an imported model cannot be read back from tokens "
    "(tokenizer.chat_template=ours asks them)"
)
COLUMNS = {  # figure -> its column in the summary
    "parses": "parses",
    "valid_call": "fits a tool",
    "name_exact": "names",
    "args_exact": "arguments",
    "call_exact": "whole turn",
    "irrelevance": "no call",
}
OVERALL = ("parallel_exact", "false_refusals")


@dataclass
class QuestionsConfig:
    """Questions about held-out conversations, before the first and after the last step."""

    per_kind: int = 200  # largest number of questions about each kind of conversation; 0: no questions
    max_new_tokens: int = 256  # longest answer

    def __post_init__(self) -> None:
        require(self.per_kind >= 0, "stage.questions.per_kind", self.per_kind, ">= 0")
        require(self.max_new_tokens > 0, "stage.questions.max_new_tokens", self.max_new_tokens, "a positive integer")


@dataclass
class ToolsStageConfig(StageConfig):
    """The `stage` group of stage tools."""

    questions: QuestionsConfig = field(default_factory=QuestionsConfig)


@dataclass
class ToolsConfig(CorpusFormsConfig):
    """The configuration of stage tools."""

    corpus_forms = ("conversation",)

    stage: ToolsStageConfig = MISSING


class Tools(Sft):
    name = "tools"
    schema = ToolsConfig
    starts_from = "code"
    in_pipeline = True
    key_figures = ((KeyFigure("tools/call_exact", percent, "calls exact"),), (BITS_PER_BYTE,), (VAL_LOSS,))

    def before_training(self, arguments: EvaluationArguments) -> dict[str, float]:
        return examine(arguments)

    def after_training(self, arguments: EvaluationArguments) -> dict[str, float]:
        return examine(arguments)

    def print_figures(self, config: Config, result: Mapping[str, Any], console: "Console") -> None:
        super().print_figures(config, result, console)
        print_calls(result, console)

    def print_samples(self, run: RunDirectory, console: "Console") -> None:
        """Prints the first question of each kind, whether the model's answer is right, and the answer; nothing without
        samples.
        """
        from dist_lm.chat.template import last_request
        from dist_lm.tokenizer.symbols import END

        printed_kinds: set[str] = set()
        for sample in last_samples(run):
            if sample["kind"] in printed_kinds:
                continue
            printed_kinds.add(sample["kind"])
            console.line(f"--- {sample['kind']}, {'right' if sample['right'] else 'wrong'}")
            for text in (last_request(sample["prompt"]).strip(), sample["found"].removesuffix(END)):
                for line in text.splitlines():
                    console.line(f"    {line}")

    def own_entries(self, result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """Yields one line with the shares of exact parallel calls and of false refusals, over all kinds of
        conversations; nothing without questions.
        """
        metrics = result["metrics"]
        shares = [
            f"{name.replace('_', ' ')} {percent(metrics[f'tools/{name}'])}"
            for name in OVERALL
            if f"tools/{name}" in metrics
        ]
        if shares:
            yield "calls", ", ".join(shares)


def examine(arguments: EvaluationArguments) -> dict[str, float]:
    """Asks questions about val, writes the answers to `samples/`, and returns `tools/*`, the same on every rank
    (collective).

    Answers are greedy. Figures are fractions; empty, with a warning, if val has no question or the chat template is
    kept; empty if none is wanted.

    Raises:
        ArtefactError: the corpus is missing or damaged, or the model's logits are not numbers.
        UserError: the tokenizer lacks the mark that ends a turn, or a document cannot be read back as a conversation.
        ConfigError: bf16 is asked for on a GPU without it.
        OSError: a file cannot be read.
    """
    from dist_lm.chat.template import stop_tokens
    from dist_lm.data.token_corpus import TokenCorpus
    from dist_lm.evaluation.tool_questions import choose, no_questions
    from dist_lm.evaluation.tool_score import figures, judge, read_answer
    from dist_lm.stages.sampling import answer_all, write_samples

    config, tokenizer = arguments.config, arguments.tokenizer
    assert isinstance(config, ToolsConfig)
    settings = config.stage.questions
    if not settings.per_kind:
        return {}
    # Scores compare calls as values, which must be read back from the tokens of the answer.
    if tokenizer.kept_template:
        if arguments.world.is_first:
            log.warning("stage.questions.per_kind=%d: %s", settings.per_kind, NO_QUESTIONS)
        return {}

    corpus = TokenCorpus.open(config.corpus_in(arguments.run.work, config.stage.corpus), "val")
    questions = choose(corpus, tokenizer, settings.per_kind, config.model.max_seq_len)
    if not questions:
        if arguments.world.is_first:
            reason = no_questions(corpus, tokenizer, config.model.max_seq_len)
            log.warning("stage.questions.per_kind=%d: %s", settings.per_kind, reason)
        return {}

    requests = requests_of(questions, stop_tokens(tokenizer), settings.max_new_tokens)
    answers = answer_all(arguments, requests, "stage.questions")

    # Every rank has all answers and judges them, so the figures are the same without another message.
    verdicts = []
    for posed, answer in zip(questions, answers, strict=True):
        turn = read_answer(answer.tokens, answer.finish == "stop", tokenizer)
        verdicts.append(judge(turn, posed.question.expected, posed.question.asked.tools))
    judged = zip(questions, answers, verdicts, strict=True)
    write_samples(arguments, (shown_answer(posed, answer, verdict, tokenizer) for posed, answer, verdict in judged))
    return figures((posed.question.kind, verdict) for posed, verdict in zip(questions, verdicts, strict=True))


def requests_of(questions: "Sequence[Asked]", ends: tuple[int, ...], max_new_tokens: int) -> "list[Request]":
    """Returns a greedy request per question, up to the end of the turn; their ids are the numbers of the questions.

    An answer is cut off at `max_new_tokens`, or 32 tokens beyond twice the right one.

    Args:
        ends: ids of the tokens that end a turn.
    """
    # The right answer bounds the wait for a model that does not end its turn.
    from dist_lm.generation.request import Request, SamplingParams

    return [
        Request(
            str(number),
            posed.prompt,
            SamplingParams(
                max_new_tokens=min(max_new_tokens, 2 * len(posed.expected) + ROOM), temperature=0, stop_tokens=ends
            ),
        )
        for number, posed in enumerate(questions)
    ]


def shown_answer(posed: "Asked", answer: "Answer", verdict: "Verdict", tokenizer: "Tokenizer") -> dict[str, Any]:
    """Returns a question with its answer and score, as a line of `samples/step_N.jsonl` holds them.

    The keys `prompt`, `expected` and `found` are tokens as text, with the names of special tokens. `kind` is that of
    the question and `finish` says why the answer ended. The other keys come from the verdict: `right` is its `exact`,
    `right_calls` its `right` and `valid_call` its `valid`; `parses` and `names` keep their names.
    """
    from dist_lm.tokenizer.tokenizer import text_with_marks

    return {
        "kind": posed.question.kind,
        "prompt": text_with_marks(posed.prompt, tokenizer),
        "expected": text_with_marks(posed.expected, tokenizer),
        "found": text_with_marks(answer.tokens, tokenizer),
        "finish": answer.finish,
        "right": verdict.exact,
        "parses": verdict.parses,
        "valid_call": verdict.valid,
        "names": verdict.names,
        "right_calls": verdict.right,
    }


def print_calls(result: Mapping[str, Any], console: "Console") -> None:
    """Prints a table of the figures in `COLUMNS`: a row `all`, then one for each kind of conversation, in alphabetical
    order. If `metrics` has no figure of a kind, as without questions, it prints nothing.

    A cell is `12 -> 80`, whole per cent before the first and after the last step. It is `80` if there is no figure from
    before, and empty if there is none from after.

    Args:
        result: result.json of the run, which has shares (0 to 1) in `metrics` and perhaps in `before`.
    """
    before, after = result.get("before", {}), result["metrics"]
    kinds = sorted({kind for name in after if (kind := kind_of(name))})
    if not kinds:
        return

    def cells(kind: str) -> list[str]:
        names = [f"tools/{figure}" + (f"_{kind}" if kind else "") for figure in COLUMNS]
        return [before_and_after(name, before, after, lambda share: f"{share * 100:.0f}") for name in names]

    # The first row is over all kinds.
    rows = [(kind or "all", *cells(kind)) for kind in ["", *kinds]]
    console.table("calls of tools never trained on, %", ("conversations", *COLUMNS.values()), rows)


def kind_of(metric: str) -> str:
    """`single` of `tools/parses_single`; empty for a figure over all kinds, and for any other metric."""
    # Figures and kinds both have underscores, so the figure is recognised by its name.
    name = metric.removeprefix("tools/")
    if name == metric:
        return ""
    return next((name.removeprefix(f"{figure}_") for figure in COLUMNS if name.startswith(f"{figure}_")), "")


STAGE = Tools()
