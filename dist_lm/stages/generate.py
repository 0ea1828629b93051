"""Stage `generate`: reads prompts and a checkpoint, leaves work/runs/generate/RUN_ID/samples/part-*.jsonl.

Part k holds what came of prompts [k S, (k+1) S), a line an answer, in the order of the prompts. A prompt's random
numbers are keyed by (seed, its number), and a part is written when it is whole: so what a kill leaves undone is done
again by parts, with the same bytes.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from dist_lm import durable
from dist_lm.data.prompts import Prompt, find_prompts, read_prompts, survey
from dist_lm.errors import ArtefactError, ConfigError
from dist_lm.generate_config import AUTO, GenerateConfig, GenerateRunConfig
from dist_lm.generation.engine import EngineOptions
from dist_lm.generation.params import SamplingParams
from dist_lm.generation.request import Answer, Refusal, Request
from dist_lm.generation.shard import check_tp
from dist_lm.json_lines import json_lines
from dist_lm.model.counter_hash import hash_words, signed
from dist_lm.run_directory import RunDirectory, WorkDirectory
from dist_lm.tokenizer.tokenizer import Tokenizer
from dist_lm.training import checkpoint_files

FROM = ("code", "language")  # stages whose checkpoint is taken, the first one that has any


def params_of(stage: GenerateConfig) -> SamplingParams:
    """How tokens are chosen.

    Raises:
        ConfigError: names the key.
    """
    try:
        return SamplingParams(
            max_new_tokens=stage.max_new_tokens,
            temperature=stage.temperature,
            top_k=stage.top_k,
            top_p=stage.top_p,
            min_p=stage.min_p,
            repetition_penalty=stage.repetition_penalty,
            logit_bias=dict(stage.logit_bias),
            stop=tuple(stage.stop),
            stop_tokens=tuple(stage.stop_tokens),
            ignore_eot=stage.ignore_eot,
        )
    except ConfigError as error:
        raise ConfigError(f"stage.{error}") from error


def options_of(stage: GenerateConfig) -> EngineOptions:
    """How large the engines are.

    Raises:
        ConfigError: names the key.
    """
    try:
        return EngineOptions(
            cache_tokens=stage.cache_tokens, page_tokens=stage.page_tokens, max_sequences=stage.max_sequences
        )
    except ConfigError as error:
        raise ConfigError(f"stage.{error}") from error


def tp_of(config: GenerateRunConfig) -> int:
    """How many devices share the model of an engine; one where that is left open (parallel.tp=-1).

    Raises:
        ConfigError: the model cannot be cut so.
    """
    tp = 1 if config.parallel.tp == -1 else config.parallel.tp
    check_tp(config.model, tp, None, "parallel.tp")
    return tp


def find_start(config: GenerateRunConfig, before: Path | None) -> Path:
    """The checkpoint that is generated from, absolute.

    Args:
        before: that the run has been generating from; it stays the one, where stage.checkpoint names no single one.

    Raises:
        ArtefactError: there is none, or it is another model's.
    """
    asked = config.stage.checkpoint
    path = None if asked == AUTO else Path(asked).expanduser().resolve()
    if before and (path is None or before.is_relative_to(path)):
        found = before
        if not before.is_dir():
            raise ArtefactError(f"{before}: this run began with that checkpoint, which is gone: choose another run_id")
    else:
        found = checkpoint_files.find_checkpoint(
            path or newest_run(WorkDirectory(Path(config.work_dir).resolve())).path
        )
    model = checkpoint_files.read_state(found)[1]
    checkpoint_files.check_same_model(found, model, config.model, "use the same model")
    return found


def newest_run(work: WorkDirectory) -> RunDirectory:
    """The run whose checkpoint was written last: of the code stage, or where that has none of the language stage.

    Raises:
        ArtefactError: there is none.
    """
    for stage in FROM:
        runs = [run for run in work.runs(stage) if checkpoint_files.read_pointer(run.checkpoints, "LATEST")]
        if runs:
            return max(runs, key=lambda run: (run.checkpoints / checkpoint_files.LATEST).stat().st_mtime)
    raise ArtefactError(
        f"stage.checkpoint=auto: no checkpoint of stage {' or '.join(FROM)} in {work.path}: "
        "run `python -m dist_lm.launch stage=code` first, or give stage.checkpoint=PATH"
    )


def tokenizer_of(config: GenerateRunConfig, checkpoint: Path) -> Tokenizer:
    """That of the work directory which the checkpoint lies in, or else of this one.

    Raises:
        ArtefactError: there is none, or it has another vocabulary than the model.
    """
    own = WorkDirectory(Path(config.work_dir)).tokenizer_model
    inside = len(checkpoint.parents) > len(("checkpoints", "RUN_ID", "STAGE", "runs"))
    beside = RunDirectory(checkpoint.parents[1]).work.tokenizer_model if inside else own
    path = beside if beside.exists() else own
    tokenizer = Tokenizer.load(path)
    if tokenizer.vocab_size != config.model.vocab_size:
        raise ArtefactError(
            f"{path} has {tokenizer.vocab_size} pieces, model.vocab_size={config.model.vocab_size}: not this model's"
        )
    return tokenizer


def label_of(checkpoint: Path) -> str:
    """What samples call their checkpoint: STAGE/RUN_ID/STEP, wherever the work directory is."""
    return "/".join(checkpoint.parts[-4:-2] + checkpoint.parts[-1:])


@dataclass
class Tally:
    """What has been done, of all prompts."""

    prompts: int = 0
    answers: int = 0
    refused: int = 0
    tokens: int = 0  # of answers

    def add(self, record: dict[str, Any]) -> None:
        """Count one line of a part."""
        self.prompts += record.get("index", 0) == 0
        self.refused += "error" in record
        self.answers += "error" not in record
        self.tokens += len(record.get("tokens", ()))


class Samples:
    """The parts of a run: the requests for those that are missing, and what comes of them."""

    def __init__(self, config: GenerateRunConfig, run: RunDirectory, tokenizer: Tokenizer) -> None:
        """Find the prompts, and the parts that are there.

        Raises:
            ConfigError: there are no prompts.
            ArtefactError: they are not those that the run began with.
        """
        self._stage, self._seed, self._run, self._tokenizer = config.stage, config.seed, run, tokenizer
        self._files = find_prompts(config.stage.prompts, run.prompts)
        self._label = label_of(Path(config.stage.checkpoint))
        found = survey(self._files)
        if run.inputs.exists() and json.loads(run.inputs.read_text()) != found:
            raise ArtefactError(
                f"stage.prompts={config.stage.prompts}: not what {run.path} began with: choose another run_id"
            )
        durable.write_json(run.inputs, found)
        self.count: int = found["prompts"]
        self.tally = Tally()
        self._missing = set(range(-(-self.count // config.stage.prompts_per_shard)))
        for part in sorted(self._missing):
            if run.samples_part(part).exists():
                self._missing.remove(part)
                for line in json_lines(run.samples_part(part)):
                    self.tally.add(line)
        self._prompts: dict[int, Prompt] = {}  # asked for, not yet answered
        self._answers: dict[int, list[Answer]] = {}
        self._open: dict[int, dict[int, list[dict[str, Any]]]] = {}  # part -> number of the prompt -> lines

    @property
    def is_done(self) -> bool:
        return not self._missing

    @property
    def parts(self) -> int:
        """How many there will be."""
        return -(-self.count // self._stage.prompts_per_shard)

    def requests(self) -> Iterator[Request]:
        """A request for each prompt of the missing parts; one that cannot be asked for is refused here."""
        params = params_of(self._stage)
        truncate = cast(Any, self._stage.truncate)
        for prompt in read_prompts(self._files):
            if prompt.number // self._stage.prompts_per_shard not in self._missing:
                continue
            self._prompts[prompt.number] = prompt
            if prompt.error:
                self._keep(prompt.number, [{"error": prompt.error}])
                continue
            tokens = [self._tokenizer.eot_id, *self._tokenizer.encode(prompt.text)]
            seed = signed(hash_words(self._seed, prompt.number))
            yield Request(str(prompt.number), tokens, params, seed, self._stage.n, truncate)

    def take(self, result: Answer | Refusal) -> None:
        """Take in an answer or a refusal; a part that is whole is written."""
        number = int(result.request)
        if isinstance(result, Refusal):
            self._answers.pop(number, None)
            self._keep(number, [{"error": result.error}])
            return
        answers = self._answers.setdefault(number, [])
        answers.append(result)
        if len(answers) == self._stage.n:
            self._keep(number, [_record(one) for one in sorted(self._answers.pop(number), key=lambda one: one.index)])

    def _keep(self, number: int, records: list[dict[str, Any]]) -> None:
        prompt = self._prompts.pop(number)
        lines = [
            {"id": prompt.id, "index": 0, "prompt": prompt.text} | one | {"checkpoint": self._label} for one in records
        ]
        for line in lines:
            self.tally.add(line)
        size = self._stage.prompts_per_shard
        part = number // size
        held = self._open.setdefault(part, {})
        held[number] = lines
        if len(held) == min(size, self.count - part * size):
            text = "".join(
                json.dumps(line, ensure_ascii=False) + "\n" for _, one in sorted(held.items()) for line in one
            )
            durable.write_text(self._run.samples_part(part), text)
            del self._open[part]
            self._missing.remove(part)


def _record(answer: Answer) -> dict[str, Any]:
    return {
        "index": answer.index,
        "text": answer.text,
        "tokens": answer.tokens,
        "logprobs": [_shortest(value) for value in answer.logprobs],
        "raw_logprobs": [_shortest(value) for value in answer.raw_logprobs],
        "finish": answer.finish,
        "seed": answer.seed,
    }


def _shortest(value: float) -> float:
    """The number with the fewest digits that is the same in fp32."""
    return float(str(np.float32(value)))
