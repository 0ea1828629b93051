"""`python -m dist_lm tools bfcl RUN`: a model on the questions of the Berkeley Function Calling Leaderboard."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from dist_lm.chat.errors import ChatError
from dist_lm.chat.messages import Message
from dist_lm.chat.template import END, prompt
from dist_lm.errors import ArtefactError, require
from dist_lm.evaluation.bfcl_check import right_calls
from dist_lm.evaluation.bfcl_data import BfclQuestion, find_data, read_questions
from dist_lm.evaluation.questions import shown
from dist_lm.evaluation.score import read_answer
from dist_lm.generation.engine import Engine, EngineOptions
from dist_lm.generation.flash_pages import PAGE_TOKENS
from dist_lm.generation.load import LoadedModel, load_model
from dist_lm.generation.params import SamplingParams
from dist_lm.generation.request import Answer, Request
from dist_lm.parallel.mesh import option_device
from dist_lm.storage import durable

MAX_NEW_TOKENS = 512
SEQUENCES = 32  # for whose whole context there is room, of short contexts
FEW_TURNS = 0.1  # share of the questions asked below which a model has not learned the format
CACHE_TOKENS = 65536  # at most, where the context is less


@dataclass(frozen=True)
class BfclResult:
    """What came of one question."""

    question: BfclQuestion
    right: bool
    is_turn: bool
    found: str  # what the model wrote; empty where it was not asked
    note: str = ""  # why it was not asked


def evaluate(path: Path, tokenizer: Path | None, limit: int, json_file: Path | None, device: str) -> None:
    """What the verb does.

    Raises:
        UserError: names the option, the missing package, or what is wrong with the checkpoint.
    """
    require(limit >= 0, "--limit", limit, "0 (all) or a positive integer")
    if json_file:  # not found out after an hour of answers
        require(
            json_file.parent.is_dir() and not json_file.is_dir(), "--json", json_file, "a file in a folder that exists"
        )
    chosen = option_device(device)
    questions = read_questions(find_data(), limit=limit)
    loaded = load_model(path, tokenizer)
    results = answer(questions, loaded, chosen, Console(stderr=True))
    print_table(loaded.name, results, Console(highlight=False))
    if json_file:
        durable.write_text(json_file, "".join(json.dumps(_record(one), ensure_ascii=False) + "\n" for one in results))


def answer(
    questions: Sequence[BfclQuestion], loaded: LoadedModel, device: torch.device, progress: Console
) -> list[BfclResult]:
    """Greedy answers to all questions, in their order, and whether they are right."""
    tokenizer, context = loaded.tokenizer, loaded.config.max_seq_len
    notes: dict[int, str] = {}
    page = PAGE_TOKENS if device.type == "cuda" else EngineOptions.page_tokens
    longest = -(-context // page) * page
    engine = Engine(
        loaded.config,
        loaded.weights,
        eot_id=tokenizer.eot_id,
        options=EngineOptions(max(longest, min(CACHE_TOKENS, SEQUENCES * longest)), page),
        dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
        device=device,
    )
    params = SamplingParams(max_new_tokens=MAX_NEW_TOKENS, temperature=0, stop_tokens=(tokenizer.special_ids[END],))
    for number, question in enumerate(questions):
        try:
            tokens = prompt(question.asked, tokenizer)
        except ChatError as error:
            notes[number] = f"no conversation: {error}"
            continue
        if len(tokens) >= context:
            notes[number] = f"{len(tokens)} tokens, the model takes {context}"
        else:
            engine.submit(Request(str(number), tokens, params))
    found = {number: BfclResult(questions[number], False, False, "", note) for number, note in notes.items()}
    left = len(questions) - len(found)
    quiet = not progress.is_terminal
    for done in track(_answers(engine), "answering", left, console=progress, disable=quiet, transient=True):
        number = int(done.request)
        turn = read_answer(done.tokens, done.finish == "stop", tokenizer, questions[number].asked.tools)
        text = shown(done.tokens, tokenizer)
        found[number] = BfclResult(questions[number], is_right(turn, questions[number]), turn is not None, text)
    return [found[number] for number in range(len(questions))]


def _answers(engine: Engine) -> Iterator[Answer]:
    """As they are done.

    Raises:
        ArtefactError: the model's numbers are none.
    """
    while engine.busy:
        for done in engine.step():
            if not isinstance(done, Answer):
                raise ArtefactError(f"the checkpoint: {done.error}")
            yield done


def is_right(turn: Message | None, question: BfclQuestion) -> bool:
    """Whether a turn is right; None: it does not parse, which counts as no call, as on the leaderboard."""
    calls = turn.calls if turn else ()
    if question.category.endswith("irrelevance"):
        return not calls
    if question.category.endswith("relevance"):
        return bool(calls)
    return right_calls(calls, question.answers, question.functions)


def print_table(name: str, results: Sequence[BfclResult], console: Console) -> None:
    """A row a category; what to do about a model that writes hardly any turn; an example of what was not asked."""
    table = Table(title=f"BFCL, one turn, Python: {name}", title_justify="left")
    table.add_column("category")
    for column in ("questions", "right", "%", "turns, %", "not asked"):
        table.add_column(column, justify="right")
    for category in dict.fromkeys(one.question.category for one in results):
        part = [one for one in results if one.question.category == category]
        right, turns = sum(one.right for one in part), sum(one.is_turn for one in part)
        not_asked = sum(bool(one.note) for one in part)
        shares = (f"{100 * right / len(part):.1f}", f"{100 * turns / len(part):.1f}")
        table.add_row(category, f"{len(part):,}", f"{right:,}", *shares, f"{not_asked:,}" if not_asked else "")
    console.print(table)
    asked, turns = sum(not one.note for one in results), sum(one.is_turn for one in results)
    if turns < FEW_TURNS * asked:
        console.print(
            f"{turns:,} of {asked:,} answers are whole turns: this model does not write calls in that format yet: "
            "train it with stage=tools, or for more stage.steps",
            soft_wrap=True,
        )
    if any(one.note for one in results):
        example = next(one for one in results if one.note)
        console.print(
            f"not asked, and counted as wrong: {example.question.id} ({example.note}), and others", soft_wrap=True
        )


def _record(one: BfclResult) -> dict[str, object]:
    return {
        "category": one.question.category,
        "id": one.question.id,
        "right": one.right,
        "parses": one.is_turn,
        "found": one.found,
        "expected": list(one.question.answers),
        "note": one.note,
    }
