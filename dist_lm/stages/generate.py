"""Stage `generate`: reads prompts and a checkpoint, leaves work/runs/generate/RUN_ID/samples/part-*.jsonl.

Here is what can be said before anything starts: which checkpoint and tokenizer, how tokens are chosen, and whether the
prompts are those that the run began with. The parts themselves: `generated_parts.py`.
"""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from dist_lm.config.generate import AUTO, GenerateConfig, GenerateRunConfig
from dist_lm.config.model import ModelConfig
from dist_lm.data.prompts import survey
from dist_lm.errors import ArtefactError, ConfigError, require
from dist_lm.generation.engine import EngineOptions
from dist_lm.generation.request import SamplingParams
from dist_lm.generation.shard import check_tp
from dist_lm.storage.run_directory import RunDirectory, WorkDirectory
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


def check_tokens(stage: GenerateConfig, model: ModelConfig) -> None:
    """Refuse what would refuse every prompt.

    Raises:
        ConfigError: names the key.
    """
    accepted = f"tokens from 0 to {model.vocab_size - 1:,} (model.vocab_size)"
    for key, tokens in (("stop_tokens", stage.stop_tokens), ("logit_bias", stage.logit_bias)):
        require(all(0 <= token < model.vocab_size for token in tokens), f"stage.{key}", tokens, accepted)
    options = options_of(stage)
    least = min(1 + stage.max_new_tokens, model.max_seq_len)  # end-of-text alone is the shortest prompt
    require(
        least <= options.n_pages * options.page_tokens,
        "stage.cache_tokens",
        stage.cache_tokens,
        f"whole pages (stage.page_tokens={stage.page_tokens}) for at least {least:,} tokens, which one answer of "
        f"stage.max_new_tokens={stage.max_new_tokens} takes",
    )


def sampling_text(stage: GenerateConfig) -> str:
    """How tokens are chosen, as keys and values: those that people always ask for, and others that are set."""
    usual, default = ("temperature", "top_k", "top_p", "max_new_tokens", "n"), GenerateConfig(name="")
    others = [one.name for one in fields(SamplingParams) if one.name not in usual]
    shown = [*usual, *(key for key in others if getattr(stage, key) != getattr(default, key))]
    values = [(key, getattr(stage, key)) for key in shown]
    return " ".join(f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in values)


def check_inputs(files: list[Path], stage: GenerateConfig, run: RunDirectory) -> dict[str, Any]:
    """What the prompts are, as `prompts.json` keeps it.

    Raises:
        ConfigError: there are no prompts, or something is wrong with all of them.
        ArtefactError: they are not those that the run began with.
    """
    found = survey(files)
    if run.inputs.exists() and json.loads(run.inputs.read_text(encoding="utf-8")) != found:
        raise ArtefactError(f"stage.prompts={stage.prompts}: not what {run.path} began with: choose another run_id")
    return found


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
