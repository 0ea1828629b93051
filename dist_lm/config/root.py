"""The whole resolved configuration.

`conf/*.yaml` gives the values, the dataclasses of this package give types and bounds. Composing refuses unknown keys
and wrong types; creating the dataclasses refuses values out of bounds and combinations that cannot run. The launcher
composes once; ranks read the resolved file from the run directory.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf._utils import get_yaml_loader
from omegaconf.errors import OmegaConfBaseException

from dist_lm.config.cluster import ClusterConfig, HardwareConfig, ParallelConfig
from dist_lm.config.corpus import CorpusConfig, TokenizerConfig
from dist_lm.config.evaluation import FILE_TASKS, EvalConfig, EvalPool
from dist_lm.config.model import AdaptedModelConfig, ModelConfig
from dist_lm.config.pool import RolloutPoolConfig
from dist_lm.config.renamed import with_present_keys
from dist_lm.config.stage import StageConfig, TrainerGroup, TrainingGroup
from dist_lm.errors import ArtefactError, ConfigError, require
from dist_lm.storage import durable
from dist_lm.storage.run_directory import WorkDirectory

TRUST_ME = "trust_me"


@dataclass
class TrackingConfig:
    """Targets of metrics besides metrics.jsonl."""

    name: str = MISSING  # wandb | none
    project: str = "dist_lm"
    entity: str | None = None
    mode: str = "auto"  # auto (online with a login, else offline) | online | offline
    tags: list[str] = field(default_factory=list)
    finish_s: float = 30.0  # online: longest wait, s, at the end of a run for a server that answers

    def __post_init__(self) -> None:
        require(self.finish_s >= 0, "tracking.finish_s", self.finish_s, ">= 0 seconds")
        require(self.name in ("wandb", "none"), "tracking.name", self.name, "wandb or none")
        require(self.mode in ("auto", "online", "offline"), "tracking.mode", self.mode, "auto, online or offline")


@dataclass
class ProfileConfig:
    """Traces of some steps, written by every rank to `profile/` in the run directory."""

    steps: list[int] = field(default_factory=list)  # [first, last], both included, first >= 1; []: no profile

    def __post_init__(self) -> None:
        valid = not self.steps or (len(self.steps) == 2 and 0 < self.steps[0] < self.steps[1])
        require(valid, "profile.steps", self.steps, "[first, last] with 0 < first < last, or []")


@dataclass
class Config:
    """The whole resolved configuration."""

    seed: int = 0
    work_dir: str = "work"
    run_id: str = "default"
    device: str = "auto"  # auto | cpu | cuda
    prerequisites: str = "build"  # missing earlier stages: build | fail (the error names the command)
    dry_run: bool = False
    sandbox: str = "strict"  # for code that models write: strict | trust_me (without isolation, if there is none here)
    model: ModelConfig = MISSING
    parallel: ParallelConfig = MISSING
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    stage: StageConfig = MISSING  # a stage that trains otherwise, or not at all, has a type of its own here
    corpus: CorpusConfig = MISSING
    tokenizer: TokenizerConfig = MISSING
    cluster: ClusterConfig = MISSING
    tracking: TrackingConfig = MISSING
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        require(self.device in ("auto", "cpu", "cuda"), "device", self.device, "auto, cpu or cuda")
        require(self.prerequisites in ("build", "fail"), "prerequisites", self.prerequisites, "build or fail")
        require(self.sandbox in ("strict", TRUST_ME), "sandbox", self.sandbox, f"strict or {TRUST_ME}")

        run_id = self.run_id
        is_name = Path(run_id).name == run_id != "" and not run_id.startswith(".") and run_id.isprintable()
        printed = run_id if run_id and run_id.isprintable() else repr(run_id)
        require(is_name, "run_id", printed, "a plain name (it becomes a folder)")

        n_pieces = self.tokenizer.vocab_size
        accepted = f"model.vocab_size={self.model.vocab_size}, which it follows: set that one"
        require(n_pieces == self.model.vocab_size, "tokenizer.vocab_size", n_pieces, accepted)
        self.check_stage()

    @property
    def pool(self) -> RolloutPoolConfig | None:
        """Keys of the pool of actors that rank 0 drives; None if the stage has no pool."""
        if not self.stage.eval_tasks or not self.eval.pool.actors:
            return None
        return EvalPool(**vars(self.eval.pool))

    @property
    def takes_sequences(self) -> bool:
        """Whether a step is stage.global_batch sequences of stage.seq_len tokens."""
        return True

    @property
    def sequence_keys(self) -> tuple[str, str] | None:
        """Keys of (sequences per update over all ranks, tokens per sequence); None if the stage has no such keys."""
        return "stage.global_batch", "stage.seq_len"

    @property
    def corpus_names(self) -> tuple[str, ...]:
        """Names of the corpora that the stage reads."""
        return self.stage.corpus_names

    def corpus_in(self, work: WorkDirectory, name: str) -> Path:
        """Returns the folder of a corpus in a work directory: the one that the plan has chosen, else NAME."""
        return work.corpus(self.corpus.folders.get(name, name))

    @property
    def noted_files(self) -> dict[str, list[Path]]:
        """Files that a run reads whenever it starts, by `KEY=VALUE`. They must stay the same until it ends."""
        noted: dict[str, list[Path]] = {}
        if tasks := self.stage.eval_tasks:
            noted |= {f"eval.{task}={path}": [path] for task, path in self.eval.files.items() if task in tasks}
        if without := self.stage.without:
            noted[f"stage.without={without}"] = [Path(without)]
        return noted

    @property
    def trained_shape(self) -> ModelConfig:
        """The model that is trained: `model`, with adapters if stage.lora asks for them."""
        if not self.stage.lora.rank:
            return self.model
        return AdaptedModelConfig.of(self.model, self.stage.lora)

    @property
    def trained_models(self) -> int:
        """The number of models of this size in a checkpoint."""
        return 1

    def check_stage(self) -> None:
        """Refuses keys of the stage that contradict other groups: what all training shares, sequences longer than the
        model's context, and corpora that cannot be mixed. A stage adds its own checks.

        Raises:
            ConfigError: names the key and what would be accepted.
        """
        if isinstance(self.stage, TrainingGroup):
            self._check_training(self.stage)
        if isinstance(self.stage, TrainerGroup):
            seq_len, longest = self.stage.seq_len, self.model.max_seq_len
            require(seq_len <= longest, "stage.seq_len", seq_len, f"at most model.max_seq_len={longest}")
        if isinstance(self.stage, StageConfig):
            self._check_mix(self.stage)

    def _check_training(self, stage: TrainingGroup) -> None:
        """Refuses, for all training: a corpus that is not configured, traced steps after the last one, wrong tasks, and
        adapters that do not fit the model or have no base.

        Raises:
            ConfigError: names the key and what would be accepted.
        """
        self.check_corpus(stage.corpus)

        traced = self.profile.steps
        accepted = f"steps up to stage.steps={stage.steps}"
        is_known = bool(stage.steps) or not stage.epochs
        require(not is_known or not traced or traced[1] <= stage.steps, "profile.steps", traced, accepted)
        self._check_eval_tasks()

        # Building the shape refuses ranks and targets of adapters that do not fit the model.
        has_adapters = self.trained_shape.lora is not None
        accepted = f"a checkpoint: stage.lora.rank={stage.lora.rank} trains adapters of its model"
        require(not has_adapters or stage.init_from != "none", "stage.init_from", "none", accepted)

        # The open axes that a layout may have are known with the number of ranks.
        if stage.lora.load_in_4bit:
            reason = "with stage.lora.load_in_4bit=true, whose base is whole on every rank"
            for axis in ("dp_shard", "tp", "cp"):
                size = getattr(self.parallel, axis)
                require(size in (1, -1), f"parallel.{axis}", size, f"1 (parallel.dp_replicate has the ranks) {reason}")
            require(not self.parallel.cpu_offload, "parallel.cpu_offload", True, f"false {reason}")

    def check_corpus(self, name: str) -> None:
        """Refuses a stage.corpus that is not configured.

        Raises:
            ConfigError: names the corpora that there are.
        """
        if name not in ("", *self.corpus.corpora):
            raise ConfigError(self.corpus_refusal(name))

    def corpus_refusal(self, name: str) -> str:
        """Returns the message that refuses stage.corpus=`name`: what there is, and the way out."""
        listed = ", ".join(self.corpus.corpora) or "none"
        return f"stage.corpus={name}: expected one of the corpora of corpus={self.corpus.name}: {listed}"

    def _check_mix(self, stage: StageConfig) -> None:
        """Refuses corpora in `stage.mix` that are not configured or are that of the stage itself, any without
        `stage.corpus`, and corpora in `stage.phases` that are not configured.

        Raises:
            ConfigError: names the corpus and those that could be.
        """
        mixable = [name for name in self.corpus.corpora if stage.corpus and name != stage.corpus]
        listed = ", ".join(mixable) or "none, so give stage.mix=null"
        accepted = f"corpora of corpus={self.corpus.name} beside stage.corpus={stage.corpus}: {listed}"
        for name, share in (stage.mix or {}).items():
            if name not in self.corpus.corpora:
                refusal = f"stage.mix={{{name}: {share:g}}}: there is no corpus {name}; expected {accepted}"
                if mixable:
                    refusal += f" (stage.mix.{name}=0 leaves it out)"
                raise ConfigError(refusal)
            require(name in mixable, "stage.mix", name, accepted)

        accepted = f"corpora of corpus={self.corpus.name}: {', '.join(self.corpus.corpora) or 'none'}"
        for name in stage.phased_corpora:
            require(name in self.corpus.corpora, "stage.phases", name, accepted)

    def _check_eval_tasks(self) -> None:
        """Refuses tasks for a model that writes no text, tasks without their file, and keys of `eval.pool` out of
        bounds.

        Raises:
            ConfigError: names the key and what would be accepted.
        """
        _ = self.pool  # its own class refuses keys that are out of bounds
        tasks = self.stage.eval_tasks
        accepted = f"none: a model with model.head={self.model.head} writes no text"
        require(not tasks or self.model.head == "tokens", "stage.eval_tasks", ", ".join(tasks), accepted)
        for task in tasks:
            if task in FILE_TASKS:
                path = getattr(self.eval, task)
                require(bool(path), f"eval.{task}", repr(path), f"the file of stage.eval_tasks={{{task}: ...}}")


def save_config(config: Config, path: Path) -> None:
    """Writes the resolved configuration as YAML, for every rank to read."""
    durable.write_text(path, OmegaConf.to_yaml(OmegaConf.structured(config)))


def load_yaml(path: Path) -> DictConfig | ListConfig:
    """Returns what `OmegaConf.load` returns for a YAML file, in a fraction of its time: libyaml parses the text, and
    OmegaConf's loader says what numbers, dates and repeated keys mean.

    Raises:
        OSError: the file cannot be read, or holds a single value.
        UnicodeDecodeError: it is not UTF-8.
        yaml.YAMLError: it is no YAML, or a key stands twice in a group.
        OmegaConfBaseException: a key or value is of a type that a configuration cannot have.
    """
    # Errors name the file of the stream.
    with path.open(encoding="utf-8") as file:
        content = yaml.load(file, Loader=_loader())  # noqa: S506  a safe loader
    if content is None:
        return OmegaConf.create()
    if not isinstance(content, (dict, list, str)):
        raise OSError(f"expected keys, not {content!r}")
    return OmegaConf.create(content)


@cache
def _loader() -> type[Any]:
    """Returns a loader whose text is parsed by libyaml, and whose values are made by the safe loader of OmegaConf."""
    of_omegaconf = get_yaml_loader()
    if not yaml.__with_libyaml__:
        return of_omegaconf

    # libyaml's parser comes first in the order of methods, so that reading and parsing are its own.
    class Loader(yaml.CSafeLoader, of_omegaconf):
        construct_mapping = of_omegaconf.construct_mapping

    return Loader


WAY_OUT = "restore it, or choose another run_id"  # end of a message about a damaged `config.yaml`


def read_groups(path: Path) -> dict[str, Any]:
    """Returns the content of a run's `config.yaml`, of this or an earlier version, of a trained or an imported run;
    interpolations are not resolved. The groups `stage` and `imported` are objects, where it has them.

    Raises:
        ArtefactError: the file is missing, cannot be read, or is no configuration of a run.
    """
    try:
        content = OmegaConf.to_container(load_yaml(path))
    except (OSError, OmegaConfBaseException, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ArtefactError(f"{path}: cannot be read ({reason}): {WAY_OUT}") from error

    if not isinstance(content, dict):
        raise ArtefactError(f"{path}: not the configuration of a run: {WAY_OUT}")
    for group in ("stage", "imported"):
        if not isinstance(content.get(group, {}), dict):
            raise ArtefactError(f"{path}: not the configuration of a run ({group}={content[group]!r}): {WAY_OUT}")
    return cast(dict[str, Any], content)


def read_content(path: Path) -> dict[str, Any]:
    """Returns the content of the `config.yaml` of a stage's run, of this or an earlier version; `stage.name` is a text.

    Raises:
        ArtefactError: as `read_groups`, or `stage.name` is missing.
    """
    content = read_groups(path)
    if not isinstance(content.get("stage", {}).get("name"), str):
        raise ArtefactError(f"{path}: not the configuration of a run, stage.name is missing: {WAY_OUT}")
    return content


def read_config(path: Path, schema_of: Callable[[str], type[Config]]) -> Config:
    """Reads a file of `save_config` and checks types and bounds again.

    A file of an earlier version may have keys of `dist_lm.config.renamed`.

    Args:
        schema_of: returns the configuration class of a stage. Only the stage that wrote the file knows the types of
            its keys.

    Raises:
        ConfigError: the file was written with other keys or types, before the schema changed, or a value is out of
            bounds.
        ArtefactError: the file cannot be read, or is no configuration of a run.
    """
    content = read_content(path)
    stage = content["stage"]["name"]
    schema = schema_of(stage)
    content = with_present_keys(content, stage)
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), content))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except OmegaConfBaseException as error:
        raise ConfigError(
            f"{path.parent} exists with other settings: {error.full_key or 'a key'} is not one of this version "
            f"({str(error).splitlines()[0]}): choose another run_id, or use the version that wrote {path.name}"
        ) from error
    assert isinstance(config, Config)
    return config


def imported_function(path: str, key: str) -> Callable[..., Any]:
    """Imports a function that a key of the configuration names, and returns it.

    Args:
        path: 'package.module:name'.
        key: the key, for messages.

    Raises:
        ConfigError: the path cannot be imported, or is not a function.
    """
    module, _, name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except Exception as error:  # the module may raise anything when it is imported
        # A module that this one imports may be missing, too: then this hint would be wrong.
        hint = ""
        if isinstance(error, ModuleNotFoundError) and error.name and f"{module}.".startswith(f"{error.name}."):
            hint = ": install it on every node, or name its folder in PYTHONPATH"
        raise ConfigError(f"{key}={path}: cannot be imported ({type(error).__name__}: {error}){hint}") from error
    if not callable(function):
        raise ConfigError(f"{key}={path}: expected a function, found {function!r}")
    return function
