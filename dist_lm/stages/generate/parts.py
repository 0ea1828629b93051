"""The output files (parts) of a run of stage `generate`: requests for missing parts, and the parts themselves.

With S = stage.prompts_per_shard, part k holds the answers to prompts [k S, (k+1) S), one per line, in the order of the
prompts. The random numbers of a prompt are keyed by (seed, prompt number), and a part is written when it is complete.
So after a kill the missing parts are generated again with the same bytes.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from dist_lm.chat.messages import Conversation, Message
from dist_lm.chat.template import prompt as chat_prompt
from dist_lm.chat.template import stop_tokens
from dist_lm.config.model import ModelConfig
from dist_lm.data.infill import InfillMarks
from dist_lm.data.prompts import Prompt, find_prompts, read_prompts
from dist_lm.errors import ConfigError, UserError, require
from dist_lm.generation.constraint import Constraint
from dist_lm.generation.engine_options import EngineOptions
from dist_lm.generation.paged_cache import PLAIN_PAGE_TOKENS
from dist_lm.generation.request import Answer, AnswerSets, Refusal, Request, SamplingParams
from dist_lm.generation.shard import check_tp
from dist_lm.model.keyed_random import hash_words, signed
from dist_lm.stages.generate.inputs import check_checkpoint, check_inputs, label_of
from dist_lm.stages.stage import PoolWork
from dist_lm.storage import durable
from dist_lm.storage.durable import json_lines
from dist_lm.storage.run_directory import RunDirectory
from dist_lm.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from dist_lm.stages.generate.stage import GenerateConfig, GenerateRunConfig

CONSTRAINT = "constraint"  # field of a prompt


def check(config: "GenerateRunConfig") -> None:
    """Refuses settings that no engine can run with.

    Raises:
        ConfigError: names the key.
    """
    params_of(config.stage)
    check_tokens(config.stage, config.model)
    tp_of(config)


def sampling_keys() -> list[str]:
    """Returns the keys of the stage that are fields of `SamplingParams`: all but the alternatives of a token, which
    files of answers do not hold."""
    return [param.name for param in fields(SamplingParams) if param.name != "top_logprobs"]


def params_of(stage: "GenerateConfig") -> SamplingParams:
    """Returns the sampling parameters.

    Raises:
        ConfigError: names the key.
    """
    try:
        params: dict[str, Any] = {key: getattr(stage, key) for key in sampling_keys()}
        return SamplingParams(**params | {"stop": tuple(stage.stop), "stop_tokens": tuple(stage.stop_tokens)})
    except ConfigError as error:
        raise ConfigError(f"stage.{error}") from error


def options_of(stage: "GenerateConfig") -> EngineOptions:
    """Returns the size of the engines.

    Raises:
        ConfigError: names the key.
    """
    try:
        return EngineOptions(
            cache_tokens=stage.cache_tokens,
            page_tokens=stage.page_tokens,
            max_sequences=stage.max_sequences,
            step_tokens=stage.step_tokens,
        )
    except ConfigError as error:
        raise ConfigError(f"stage.{error}") from error


def check_tokens(stage: "GenerateConfig", model: ModelConfig) -> None:
    """Refuses settings with which every prompt would be refused: ids outside the vocabulary, or a cache too small for
    an answer.

    Raises:
        ConfigError: names the key.
    """
    accepted = f"tokens from 0 to {model.vocab_size - 1:,} (model.vocab_size)"
    for key, tokens in (("stop_tokens", stage.stop_tokens), ("logit_bias", stage.logit_bias)):
        require(all(0 <= token < model.vocab_size for token in tokens), f"stage.{key}", tokens, accepted)
    page = options_of(stage).page_tokens or PLAIN_PAGE_TOKENS  # the device is not known yet
    # End-of-text alone is the shortest prompt.
    fewest_tokens = min(1 + stage.max_new_tokens, model.max_seq_len)
    require(
        fewest_tokens <= stage.cache_tokens // page * page,
        "stage.cache_tokens",
        stage.cache_tokens,
        f"whole pages (stage.page_tokens={page}) for at least {fewest_tokens:,} tokens, which one answer of "
        f"stage.max_new_tokens={stage.max_new_tokens} takes",
    )


def tp_of(config: "GenerateRunConfig") -> int:
    """Returns the number of devices that share the model of an engine; 1 for parallel.tp=-1.

    Raises:
        ConfigError: the model cannot be split over this number of devices.
    """
    tp = max(1, config.parallel.tp)
    check_tp(config.model, tp, None, "parallel.tp")
    return tp


@dataclass
class Tally:
    """Counts of a run so far."""

    prompts: int = 0
    answers: int = 0
    refused: int = 0
    tokens: int = 0  # generated for answers
    refusal: str = ""  # place and reason of the refusal with the smallest prompt number
    refused_at: int = -1  # this prompt number

    def add(self, record: dict[str, Any], number: int) -> None:
        """Counts one line of a part, which belongs to prompt `number`."""
        # A prompt has a line for each answer; the first one counts the prompt.
        self.prompts += record.get("index", 0) == 0
        if "error" in record:
            self.refused += 1
            if not self.refusal or number < self.refused_at:
                self.refusal, self.refused_at = record["error"], number
        self.answers += "error" not in record
        self.tokens += len(record.get("tokens", ()))


class Samples(PoolWork):
    """Makes the requests for the missing parts of a run and writes their answers."""

    def __init__(self, config: "GenerateRunConfig", run: RunDirectory, tokenizer: Tokenizer) -> None:
        """Finds the prompts and the existing parts.

        Raises:
            ConfigError: there are no prompts, or the files are invalid.
            ArtefactError: the run began with other prompts, or other weights.
            UserError: with stage.chat, the tokenizer lacks the mark that ends a turn.
        """
        self._stage = config.stage
        self._seed = config.seed
        self._run = run
        self._tokenizer = tokenizer
        self._label = label_of(Path(config.stage.checkpoint))
        self._context = config.model.max_seq_len
        self._params = params_of(config.stage)
        if config.stage.chat:
            self._params = replace(self._params, stop_tokens=(*self._params.stop_tokens, *stop_tokens(tokenizer)))

        # The stamps are taken before the prompts are read, so that no change goes unnoticed.
        self._files = find_prompts(config.stage.prompts)
        self._stamps = [_stamp(file) for file in self._files]
        inputs = check_inputs(self._files, config.stage, run)
        durable.write_sealed(run.inputs, inputs | check_checkpoint(Path(config.stage.checkpoint), run))
        self.count: int = inputs["prompts"]

        # Existing parts count as answered.
        self.tally = Tally()
        self._missing = set(range(-(-self.count // config.stage.prompts_per_shard)))
        for part in sorted(self._missing):
            if run.samples_part(part).exists():
                self._missing.remove(part)
                number = part * config.stage.prompts_per_shard - 1
                for line in json_lines(run.samples_part(part)):
                    number += line["index"] == 0
                    self.tally.add(line, number)

        self._prompts: dict[int, Prompt] = {}  # requested, not yet answered
        self._answers = AnswerSets()
        self._open: dict[int, dict[int, list[dict[str, Any]]]] = {}  # part -> number of the prompt -> lines

    @property
    def is_done(self) -> bool:
        return not self._missing

    @property
    def table(self) -> Path:
        return self._run.samples_part(0)

    @property
    def done(self) -> tuple[int, int]:
        return self.tally.prompts, self.tally.tokens

    def metrics(self) -> dict[str, float]:
        """Returns the counts so far, `generate/prompts` (refused ones included), `answers`, `refused` and `tokens`;
        `generate/new_tokens_mean`, per answer, only after the first answer.
        """
        tally = self.tally
        metrics: dict[str, float] = {
            "generate/prompts": tally.prompts,
            "generate/answers": tally.answers,
            "generate/refused": tally.refused,
            "generate/tokens": tally.tokens,
        }
        if tally.answers:
            metrics["generate/new_tokens_mean"] = tally.tokens / tally.answers
        return metrics

    def result(self) -> dict[str, Any]:
        """Returns the fields of `result.json`, with the first refusal (empty: none)."""
        tally = self.tally
        return {
            "checkpoint": self._stage.checkpoint,
            "prompts": tally.prompts,
            "answers": tally.answers,
            "refused": tally.refused,
            "first_refusal": tally.refusal,
            "tokens": tally.tokens,
            "parts": self.parts,
        }

    @property
    def parts(self) -> int:
        """The number of parts of the finished run."""
        return -(-self.count // self._stage.prompts_per_shard)

    def requests(self) -> Iterator[Request]:
        """Yields requests for the prompts of missing parts. Invalid prompts are recorded as refused here.

        Raises:
            ConfigError: the prompts are gone.
            ArtefactError: the prompts changed while they were read.
            OSError: a file cannot be read.
        """
        truncate = cast(Any, self._stage.truncate)
        for prompt in read_prompts(self._files):
            if prompt.number // self._stage.prompts_per_shard not in self._missing:
                continue
            self._prompts[prompt.number] = prompt

            # A refused prompt gets its line in the part like an answered one.
            if prompt.error:
                self._refuse(prompt.number, prompt.error)
                continue
            try:
                tokens = self._tokens(prompt)
                constraint = None
                if CONSTRAINT in prompt.extra:
                    constraint = Constraint.from_json(prompt.extra[CONSTRAINT])
            except UserError as error:
                self._refuse(prompt.number, str(error))
                continue

            # The seed depends on the prompt alone, so an answer does not depend on the engine or the order.
            seed = signed(hash_words(self._seed, prompt.number))
            yield Request(
                str(prompt.number), tokens, self._params, seed, self._stage.n, truncate, constraint=constraint
            )
        self._check_prompts()

    def take(self, result: Answer | Refusal) -> None:
        """Stores an answer or a refusal. Writes a part when it is complete.

        Raises:
            ConfigError: the prompts are gone.
            ArtefactError: the prompts changed while they were read.
        """
        number, answers = int(result.request), self._answers.add(result, self._stage.n)
        if isinstance(answers, Refusal):
            self._refuse(number, answers.error)
        elif answers:
            self._keep(number, [_record(answer) for answer in answers])

    def _check_prompts(self) -> None:
        """Refuses prompts that changed while they were read, which takes as long as the run.

        Raises:
            ConfigError, ArtefactError: they are gone, or not those that the run began with.
        """
        stamps = [_stamp(file) for file in self._files]
        if stamps != self._stamps:
            check_inputs(find_prompts(self._stage.prompts), self._stage, self._run)
            self._stamps = stamps

    def _tokens(self, prompt: Prompt) -> list[int]:
        """Returns the tokens of a prompt; with truncate=left a plain text that is too long keeps its first token and
        its end.

        Raises:
            UserError: with its suffix, or in its turn, it fills the context (cutting off the beginning would cut off a
                mark); it has a suffix with stage.chat; it is not Unicode; or the tokenizer lacks the marks, or its
                template refuses the turn.
        """
        if self._stage.chat:
            if prompt.suffix is not None:
                raise UserError("the prompt has a suffix, and stage.chat=true: leave one of them out")
            tokens = chat_prompt(Conversation((Message("user", prompt.text),)), self._tokenizer)
            return self._with_room(tokens, "the prompt in its turn has")
        tokens = self._tokenizer.encode_prompt(prompt.text)
        if prompt.suffix is not None:
            tokens = InfillMarks.of(self._tokenizer).prompt(tokens, self._tokenizer.encode(prompt.suffix))
            return self._with_room(tokens, "prompt and suffix have")

        # The engine cuts from the left too, but the model has seen no text without its first token.
        first_token = self._tokenizer.first_token
        is_cut = self._stage.truncate == "left" and len(tokens) >= self._context
        if is_cut and first_token.id != first_token.end_of_text:
            n_last = max(2, self._context - self._params.max_new_tokens) - 1
            return [tokens[0], *tokens[-n_last:]]
        return tokens

    def _with_room(self, tokens: list[int], what: str) -> list[int]:
        """Returns the tokens if they leave space for an answer.

        Raises:
            UserError: they fill the context.
        """
        if len(tokens) >= self._context:
            raise UserError(
                f"{what} {len(tokens)} tokens and model.max_seq_len is {self._context}, which leaves no space for an "
                "answer: shorten what is asked"
            )
        return tokens

    def _refuse(self, number: int, reason: str) -> None:
        self._keep(number, [{"error": f"{self._prompts[number].place}: {reason}"}])

    def _keep(self, number: int, records: list[dict[str, Any]]) -> None:
        """Counts and stores the lines of a prompt; writes its part if that is complete now.

        Raises:
            ConfigError: the prompts are gone.
            ArtefactError: the prompts changed while they were read.
        """
        prompt = self._prompts.pop(number)
        question: dict[str, Any] = {"line": prompt.line} if prompt.error else {"prompt": prompt.text}
        if prompt.suffix is not None:
            question["suffix"] = prompt.suffix
        if prompt.extra:
            question["extra"] = prompt.extra
        # A record replaces the index; a refusal has none.
        lines = [{"id": prompt.id, "index": 0} | question | record | {"checkpoint": self._label} for record in records]
        for line in lines:
            self.tally.add(line, number)

        size = self._stage.prompts_per_shard
        part = number // size
        lines_of = self._open.setdefault(part, {})
        lines_of[number] = lines
        # Lines come in any order; the part is written when its last prompt has its lines.
        if len(lines_of) == min(size, self.count - part * size):
            text = "".join(
                json.dumps(line, ensure_ascii=False) + "\n"
                for _, lines_of_prompt in sorted(lines_of.items())
                for line in lines_of_prompt
            )
            self._check_prompts()
            durable.write_text(self._run.samples_part(part), text)
            del self._open[part]
            self._missing.remove(part)


def _stamp(file: Path) -> tuple[int, int, int] | None:
    """(modification time, size, inode), which differ once a file was written to or replaced; None: it is gone."""
    if not file.exists():
        return None
    stat = file.stat()
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


def _record(answer: Answer) -> dict[str, Any]:
    """Returns the fields of a line that come from the answer; log-probabilities are nats."""
    return {
        "index": answer.index,
        "text": answer.text,
        "tokens": answer.tokens,
        "logprobs": [_shortest(logprob) for logprob in answer.logprobs],
        "raw_logprobs": [_shortest(logprob) for logprob in answer.raw_logprobs],
        "finish": answer.finish,
        "seed": answer.seed,
    }


def _shortest(number: float) -> float:
    """Returns the number with the fewest digits that is equal in fp32."""
    return float(str(np.float32(number)))
