"""`python -m dist_lm tools bfcl RUN`: score a model on the single-turn questions of the Berkeley Function Calling
Leaderboard (BFCL).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from dist_lm.errors import require
from dist_lm.evaluation.bfcl_questions import BfclQuestion, find_data, read_questions
from dist_lm.evaluation.figures import request_of
from dist_lm.evaluation.tasks import BFCL, TURN_TOKENS, Asking, bfcl_items
from dist_lm.generation.load import LoadedModel, load_model
from dist_lm.generation.request import RequestError, only_answers
from dist_lm.generation.session import build_engine
from dist_lm.parallel.mesh import option_device
from dist_lm.storage import durable, outputs
from dist_lm.tokenizer.tokenizer import text_with_marks
from dist_lm.tracking.readable import OutputConsole

SEQUENCES = 32  # the cache holds this many whole contexts, up to CACHE_TOKENS
CACHE_TOKENS = 65536
FEW_TURNS = 0.1  # a smaller share of parsed turns means that the model has not learned the format


@dataclass(frozen=True)
class BfclResult:
    """The answer to one question and its score."""

    question: BfclQuestion
    right: bool
    is_turn: bool
    found: str  # the text the model wrote; empty if the question was not asked
    note: str = ""  # why it was not asked


def evaluate(
    path: Path, tokenizer: Path | None, limit: int, json_file: Path | None, device: str, constrain_calls: bool = False
) -> None:
    """Runs the verb: prints the table, and writes the answers to `json_file` (a JSON object per line).

    Args:
        path: run or checkpoint.
        tokenizer: file of the tokenizer; None: that of the run or checkpoint.
        limit: questions per category; 0: all.
        json_file: replaced after the last answer; None: no file.
        device: auto, cpu or cuda.
        constrain_calls: whether only calls that fit their tool's schema can be drawn.

    Raises:
        ConfigError: names the option.
        ArtefactError: the package or the checkpoint is missing or damaged, or the model's logits are not numbers.
        UserError: the tokenizer lacks the marks of a conversation.
        OSError: `json_file` cannot be written.
    """
    require(limit >= 0, "--limit", limit, "0 (all) or a positive integer")
    outputs.file_to_write("--json", json_file)  # before the model spends an hour on answers
    torch_device = option_device(device)
    questions = read_questions(find_data(), limit=limit)
    loaded = load_model(path, tokenizer)

    outcomes = answer(questions, loaded, torch_device, OutputConsole(stderr=True), constrain_calls)
    print_table(loaded.name, outcomes, OutputConsole())
    if json_file:
        lines = [json.dumps(_record(outcome), ensure_ascii=False) + "\n" for outcome in outcomes]
        durable.write_text(json_file, "".join(lines))


def answer(
    questions: Sequence[BfclQuestion],
    loaded: LoadedModel,
    device: torch.device,
    progress: Console,
    constrain_calls: bool = False,
) -> list[BfclResult]:
    """Answers all questions greedily and scores the answers. The results are in the order of the questions.

    A question that cannot be asked counts as wrong and has a note. The engine is built for the call.

    Args:
        progress: shows a bar if it is a terminal.
        constrain_calls: as in `evaluate`.

    Raises:
        ArtefactError: the weights do not fit the model, or its logits are not numbers.
        UserError: the tokenizer lacks the marks of a conversation.
    """
    tokenizer = loaded.tokenizer
    engine = build_engine(loaded, device, SEQUENCES, CACHE_TOKENS)
    asking = Asking.greedy(tokenizer, loaded.config.max_seq_len, True, TURN_TOKENS, constrain_calls=constrain_calls)
    items = bfcl_items(asking, questions)
    outcomes: dict[int, BfclResult] = {}  # the key is the index of the question
    for index, item in enumerate(items):
        error = item.error
        if not error:
            try:
                engine.submit(request_of(index, BFCL, item, 0))
            except RequestError as refusal:  # a schema that no value fits
                error = refusal.reason
        if error:
            outcomes[index] = BfclResult(questions[index], False, False, "", error)

    answers = only_answers(engine.results(), loaded.name)
    num_submitted = len(items) - len(outcomes)
    is_quiet = not progress.is_terminal
    for reply in track(answers, "answering", num_submitted, console=progress, disable=is_quiet, transient=True):
        index = int(reply.request)
        record = items[index].judge(reply, None)()
        text = text_with_marks(reply.tokens, tokenizer)
        outcomes[index] = BfclResult(questions[index], record["passed"], record["is_turn"], text)
    return [outcomes[index] for index in range(len(questions))]


def print_table(name: str, outcomes: Sequence[BfclResult], console: Console) -> None:
    """Prints a row for each category, with shares in percent, and advice if few answers parse or questions were
    skipped."""
    table = Table(title=f"BFCL, one turn, Python: {name}", title_justify="left")
    table.add_column("category")
    for column in ("questions", "right", "%", "turns, %", "not asked"):
        table.add_column(column, justify="right")

    # A dictionary keeps the order of the questions, which a set would lose.
    for category in dict.fromkeys(outcome.question.category for outcome in outcomes):
        rows = [outcome for outcome in outcomes if outcome.question.category == category]
        num_right = sum(outcome.right for outcome in rows)
        num_turns = sum(outcome.is_turn for outcome in rows)
        num_skipped = sum(bool(outcome.note) for outcome in rows)
        shares = (f"{100 * num_right / len(rows):.1f}", f"{100 * num_turns / len(rows):.1f}")
        skipped = f"{num_skipped:,}" if num_skipped else ""
        table.add_row(category, f"{len(rows):,}", f"{num_right:,}", *shares, skipped)
    console.print(table)

    num_asked = sum(not outcome.note for outcome in outcomes)
    num_turns = sum(outcome.is_turn for outcome in outcomes)
    if num_turns < FEW_TURNS * num_asked:
        console.print(
            f"{num_turns:,} of {num_asked:,} answers are whole turns: this model has not learned the call format; "
            "train it with stage=tools, or for more stage.steps",
            soft_wrap=True,
        )
    if skipped_results := [outcome for outcome in outcomes if outcome.note]:
        example = skipped_results[0]
        console.print(
            f"not asked, and counted as wrong: {example.question.id} ({example.note}), and others", soft_wrap=True
        )


def _record(outcome: BfclResult) -> dict[str, object]:
    """Returns the JSON object of a result in the file of answers."""
    return {
        "category": outcome.question.category,
        "id": outcome.question.id,
        "right": outcome.right,
        "parses": outcome.is_turn,
        "found": outcome.found,
        "expected": list(outcome.question.answers),
        "note": outcome.note,
    }
