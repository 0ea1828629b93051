"""Stage `sft`: supervised fine-tuning on conversations; the model learns what the assistant writes.

It starts from an imported model (`stage.init_from=hf:FOLDER`) or from any run, and needs no earlier stage. Several data
sets are corpora: `stage.corpus`, and others with a share of the sequences in `stage.mix`. Conversations are packed
whole and do not see one another.

Before the first step and after the last it writes the last answer of a few held-out conversations.
"""

import logging
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from omegaconf import MISSING

from dist_lm.config.root import Config
from dist_lm.config.stage import StageConfig
from dist_lm.errors import ConfigError, require
from dist_lm.stages.corpus_forms import CorpusFormsConfig, require_form
from dist_lm.stages.stage import BITS_PER_BYTE, VAL_LOSS
from dist_lm.stages.text import TextStage
from dist_lm.stages.training.arguments import EvaluationArguments
from dist_lm.stages.training.stage import SAMPLE_LINES, RunState, last_samples
from dist_lm.storage.run_directory import RunDirectory

if TYPE_CHECKING:
    from dist_lm.data.token_corpus import TokenCorpus
    from dist_lm.tracking.console import Console

log = logging.getLogger(__name__)

PRINTED_ANSWERS = 3  # in the summary


@dataclass
class AnswersConfig:
    """Greedy answers to held-out conversations, before the first and after the last step."""

    conversations: int = 8  # in val: the model writes their last answers; 0: no answers
    max_new_tokens: int = 256  # longest answer

    def __post_init__(self) -> None:
        require(self.conversations >= 0, "stage.answers.conversations", self.conversations, "0 or a positive integer")
        require(self.max_new_tokens > 0, "stage.answers.max_new_tokens", self.max_new_tokens, "a positive integer")


@dataclass
class SftStageConfig(StageConfig):
    """The `stage` group of stage sft."""

    answers: AnswersConfig = field(default_factory=AnswersConfig)


@dataclass
class SftConfig(CorpusFormsConfig):
    """The configuration of stage sft."""

    corpus_forms = ("conversation",)

    stage: SftStageConfig = MISSING


class Sft(TextStage):
    name = "sft"
    answers_requests = True
    schema = SftConfig
    in_pipeline = False
    key_figures = ((VAL_LOSS,), (BITS_PER_BYTE,))

    def check(self, config: Config) -> None:
        """Refuses a corpus without conversations, whose answers the stage learns, and what text stages refuse.

        Raises:
            ConfigError: names the key.
        """
        require_form(config)
        super().check(config)

    def verify(self, on_disk: RunState, config: Config, init_from: str, rebuilt: Collection[str]) -> Path | None:
        """As `TrainingStage.verify`; also refuses a new run that names no model to start from.

        Raises:
            ConfigError: stage.init_from is not given, or as `TrainingStage.verify`.
        """
        # Random weights in place of an open model would be noticed only after the whole run.
        is_new = not on_disk.latest and not config.stage.branch_from
        if is_new and init_from == "auto" and self.starts_from is None:
            raise ConfigError(
                f"stage.init_from=auto: stage {self.name} follows no other stage: expected hf:FOLDER or hf:ID of an "
                "open model, a run such as work/runs/code/default, or none (random weights)"
            )
        return super().verify(on_disk, config, init_from, rebuilt)

    def before_training(self, arguments: EvaluationArguments) -> dict[str, float]:
        write_answers(arguments)
        return {}

    def after_training(self, arguments: EvaluationArguments) -> dict[str, float]:
        write_answers(arguments)
        return {}

    def print_samples(self, run: RunDirectory, console: "Console") -> None:
        """Prints the end of the first held-out conversations, the model's answer and that of the corpus; nothing
        without answers."""
        for sample in last_samples(run)[:PRINTED_ANSWERS]:
            for title, text in (
                ("asked", sample["prompt"]),
                ("answered", sample["found"]),
                ("in the corpus", sample["expected"]),
            ):
                console.line(f"--- {title}")
                lines = text.strip().splitlines()
                # The turns that the model answers to stand at the end of a long conversation.
                ends = lines[-SAMPLE_LINES:] if title == "asked" else lines[:SAMPLE_LINES]
                for line in ends:
                    console.line(f"    {line}")


@dataclass(frozen=True)
class HeldOutAnswer:
    """The last answer of a conversation, as token ids."""

    prompt: list[int]  # everything before the answer
    expected: list[int]  # the answer, with the token that ends it


def write_answers(arguments: EvaluationArguments) -> None:
    """Writes the model's answers to held-out conversations to `samples/` (collective); nothing if none is wanted.

    Raises:
        ArtefactError: the corpus is missing or damaged, or the model's logits are not numbers.
        ConfigError: bf16 is asked for on a GPU without it.
        OSError: a file cannot be read.
        RequestError: a prompt does not fit the context.
    """
    from dist_lm.data.token_corpus import TokenCorpus
    from dist_lm.generation.request import Request, SamplingParams
    from dist_lm.stages.sampling import answer_all, write_samples
    from dist_lm.tokenizer.tokenizer import text_with_marks

    config, tokenizer = arguments.config, arguments.tokenizer
    assert isinstance(config, SftConfig)
    settings = config.stage.answers
    if not settings.conversations:
        return
    corpus = TokenCorpus.open(arguments.run.corpus(config.stage.corpus), "val")
    context = config.model.max_seq_len
    held_out = held_out_answers(corpus, settings.conversations, context - 1)
    if not held_out:
        if arguments.world.is_first:
            log.warning(
                "stage.answers.conversations=%d: %s: val has no answer whose prompt fits the model's context of %d "
                "tokens",
                settings.conversations,
                corpus.directory,
                context,
            )
        return

    # The token that ends the answer in the corpus ends it in any chat template.
    requests = [
        Request(
            str(number),
            held_out_answer.prompt,
            SamplingParams(
                max_new_tokens=min(settings.max_new_tokens, context - len(held_out_answer.prompt)),
                temperature=0,
                stop_tokens=(held_out_answer.expected[-1],),
            ),
        )
        for number, held_out_answer in enumerate(held_out)
    ]
    answers = answer_all(arguments, requests, "stage.answers")

    samples = [
        {
            "prompt": text_with_marks(held_out_answer.prompt, tokenizer),
            "expected": text_with_marks(held_out_answer.expected, tokenizer),
            "found": text_with_marks(answer.tokens, tokenizer),
            "finish": answer.finish,
        }
        for held_out_answer, answer in zip(held_out, answers, strict=True)
    ]
    write_samples(arguments, samples)


def held_out_answers(corpus: "TokenCorpus", count: int, longest_prompt: int) -> list[HeldOutAnswer]:
    """Returns the last answers of the first `count` conversations whose prompt has at most `longest_prompt` tokens;
    every call returns the same.

    The loss mask tells where an answer begins and ends, whatever the chat template.

    Raises:
        ArtefactError: a tar of the corpus is damaged.
    """
    answers: list[HeldOutAnswer] = []
    for document in range(corpus.n_documents):
        if len(answers) == count:
            break
        length = int(corpus.lengths[document])
        mask = corpus.mask(document, 0, length)
        learned = np.flatnonzero(mask)
        if not learned.size:
            continue

        # The last stretch of learned tokens is the last answer, with the token that ends it.
        stop = int(learned[-1]) + 1
        not_learned = np.flatnonzero(mask[:stop] == 0)
        start = int(not_learned[-1]) + 1 if not_learned.size else 0
        if 0 < start <= longest_prompt:
            tokens = corpus.tokens(document, 0, stop).tolist()
            answers.append(HeldOutAnswer(tokens[:start], tokens[start:]))
    return answers


STAGE = Sft()
