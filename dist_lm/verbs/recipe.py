"""`dist-lm recipe new MODEL --data FILE --out DIR/experiment/NAME.yaml` writes an experiment that fine-tunes a model,
after a look at model, data and machine.

docs/recipes.md has the rules and their sources.
"""

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import yaml
from rich.console import Console
from rich.text import Text

from dist_lm.config.corpus import HF, CorpusConfig, SourceConfig
from dist_lm.config.model import ModelConfig
from dist_lm.config.root import Config
from dist_lm.data.corpus_file import CONVERSATIONS, NAME, one_line
from dist_lm.data.ingest import BYTES_PER_TOKEN
from dist_lm.data.new import MOST_REMEDIES, Origin, Remedy, Survey, new_corpus, pair_words, survey
from dist_lm.data.propose import PairColumns
from dist_lm.data.token_corpus import TokenCorpus
from dist_lm.errors import ConfigError, require
from dist_lm.prepare.conf_folders import choices
from dist_lm.prepare.plan import plan_command
from dist_lm.storage import durable, outputs
from dist_lm.storage.run_directory import WorkDirectory
from dist_lm.tracking.readable import counted, readable_count
from dist_lm.verbs.data_trial import try_command

SFT, PREFERENCE, RLHF = "sft", "preference", "rlhf"
RANKINGS = "rankings"  # corpus of --preferences
MOST_TOKENS = 8192  # in a sequence, where the data does not ask for fewer
LONG_SHARE = 0.01  # part of the conversations that may be longer than a sequence
EPOCHS, EPOCHS_OF_MANY, MANY = 3, 2, 50_000  # conversations
STEPS_OF_EPOCH = 32  # the batch grows until an epoch has no more steps than about this
BATCHES = (4, 64)  # smallest and largest global batch
# Learning rates of whole models, by the number of parameters from which on they hold, the largest first.
FULL_RATES = ((4_000_000_000, 1e-5), (400_000_000, 2e-5), (0, 1e-4))
LORA_RATE_RATIO = 10
LORA = {"rank": 16, "alpha": 32, "dropout": 0.05}
WARMUP_SHARE, PREFERENCE_WARMUP_SHARE = 0.03, 0.1
PREFERENCE_RATE, RL_RATE = 5e-7, 1e-6
EPOCHS_OF_FEW_PAIRS = 3  # epochs if one has fewer than `STEPS_OF_EPOCH` steps
PREFERENCE_BATCH = 32  # largest global batch of stage preference
SAMPLE_BYTES = 256 << 20  # most text that is read of the data
USED_MEMORY = 0.8  # part of the free memory of a CPU's machine, for all ranks


@dataclass
class Measured:
    """Lengths of the first rows of the data under the tokenizer of the model."""

    lengths: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # tokens of conversations


@dataclass(frozen=True)
class Start:
    """The model that training starts from."""

    init_from: str  # hf:SOURCE, or a run
    shape: ModelConfig
    keys: Mapping[str, str]  # further keys of a command that starts from it
    model_file: str = ""  # content of DIR/model/NAME.yaml; empty: the shape follows from the model


def new_recipe(
    model: str,
    data: Sequence[str],
    out: Path,
    console: Console,
    *,
    preferences: Sequence[str] = (),
    prompts: Path | None = None,
    reward: str = "",
    force: bool = False,
    question: str = "",
    answer: str = "",
    pair: PairColumns | None = None,
) -> None:
    """Writes the experiment `out`, a corpus file beside it, and for a run as the model a model file; prints what was
    seen and the command.

    The command is planned, and its corpora are built from the first rows in a temporary folder, before the experiment
    is written.

    Args:
        model: hf:FOLDER, hf:ID, a run or a checkpoint.
        data: files, folders, globs or URLs of conversations.
        preferences: files of preferences: stage preference follows.
        prompts: file of prompts: stage rlhf follows, with the function `reward` (module:function).
        force: replace existing files.
        question, answer: columns of a question and of its answer in `data`; empty: conversations are recognised.
        pair: columns of `preferences`; None or false: they are recognised.

    Raises:
        ConfigError: `out` is no path for an experiment, or a file to write exists and `force` is false; prompts stand
            beside preferences, or without `reward`, or `pair` is given without preferences; the data holds no
            conversations, or the model does not fit this machine.
        ArtefactError: model or data cannot be read.
        UserError: the command must fail; no experiment is written.
    """
    outputs.new_file("--out", out, force=force)
    check_out(out)
    require(not (preferences and prompts), "--prompts", prompts, "nothing beside --preferences: one stage follows")
    require(bool(prompts) == bool(reward), "--reward", repr(reward), "module:function, together with --prompts FILE")
    folder, name = out.parent.parent, out.stem
    words = ["dist-lm", "recipe", "new", model, *(word for path in data for word in ("--data", path))]
    words += pair_words(question, answer)
    words += [word for path in preferences for word in ("--preferences", path)]
    pair = pair or PairColumns()
    pair.check()
    require(bool(preferences) or not pair, "--chosen-column", pair.chosen, "no column without --preferences FILE")
    words += pair.words()
    if prompts:
        words += ["--prompts", str(prompts), "--reward", reward]
    words += ["--out", str(out)]
    command = shlex.join(["python", "-m", "dist_lm.launch", "--config-dir", str(folder), f"experiment={name}"])

    corpus_file, model_file = folder / "corpus" / f"{name}.yaml", folder / "model" / f"{name}.yaml"
    written_files = [corpus_file]
    if not model.startswith(HF):
        written_files += [model_file]
    for file in written_files:
        outputs.new_file(f"--out {out}: it comes with", file, force=force)
    new_files: list[Path] = []
    new_folders = [path for path in (corpus_file.parent, model_file.parent, out.parent, folder) if not path.exists()]
    try:
        # Unreadable data is refused before anything is built.
        pairs = survey_of_preferences(preferences, pair) if preferences else None
        origin = Origin(words, command)
        start, surveys, measured = _look(
            model, data, corpus_file, model_file, console, force, new_files, question, answer, origin
        )
        if preferences:
            _add_rankings(corpus_file, preferences, pair)
        stages, remarks = plan_stages(start, name, folder, surveys[CONVERSATIONS], measured)
        if text_corpora := [corpus for corpus in surveys if corpus != CONVERSATIONS]:
            remarks.append(
                f"texts of --data are not trained on: corpora {', '.join(text_corpora)}; a share in mix adds them"
            )
        content = {"run_id": name, "corpus": name, "parallel": "auto"} | dict(start.keys) | hardware_keys()
        if pairs:
            stages[PREFERENCE], line = preference_keys(start, stages[SFT], pairs)
            remarks.append(line)
        if prompts:
            stages[RLHF] = rlhf_keys(stages[SFT])
            content["rlhf"] = rlhf_group(prompts, reward, stages[SFT])
        content = {"stage": list(stages)[-1]} | content | {"stages": stages}

        # Nobody should find out by a refusal that a file cannot run.
        text, remedies = tried(folder, name, [f"Written by: {shlex.join(words)}", command, *remarks], content)
    except BaseException:
        # Without its experiment, a file would only be in the way of the next try.
        for file in new_files:
            file.unlink(missing_ok=True)
        for path in new_folders:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
        raise
    _write_new("--out", out, text, force)
    names = ", ".join(str(file) for file in (*written_files, out))
    for line in (*remarks, *remedies, f"written: {names}", command):
        console.print(Text(one_line(line)), soft_wrap=True)


def _look(
    model: str,
    data: Sequence[str],
    corpus_file: Path,
    model_file: Path,
    console: Console,
    force: bool,
    new_files: list[Path],
    question: str,
    answer: str,
    origin: Origin,
) -> tuple[Start, dict[str, Survey], Measured]:
    """Returns what model and data are, after writing the corpus file, and the model file for a run.

    Args:
        new_files: gets the files that were written and replaced none.

    Raises:
        ConfigError, ArtefactError, UserError: as `new_recipe`.
    """
    name = corpus_file.stem
    start = start_of(model, name)

    # The first try builds the corpora for their lengths; the file is written when it has passed.
    measured = Measured()

    # Files that were there before are not removed after an error.
    replaced = [file for file in (corpus_file, model_file) if file.exists()]
    surveys = new_corpus(
        data,
        corpus_file,
        console,
        sample_bytes=SAMPLE_BYTES,
        force=force,
        reserved_names=choices("corpus"),
        trial=lambda config_dir, _: _measure(config_dir, name, start, measured),
        origin=origin,
        question=question,
        answer=answer,
    )
    new_files += [corpus_file] if corpus_file not in replaced else []

    if CONVERSATIONS not in surveys:
        raise ConfigError(
            f"--data {' '.join(data)}: texts, not conversations. Columns of questions and of answers are named by "
            "--question COLUMN --answer COLUMN; stage=code trains on texts"
        )

    if start.model_file:
        _write_new("--out", model_file, start.model_file, force)
        new_files += [model_file] if model_file not in replaced else []
    return start, surveys, measured


def check_out(out: Path) -> None:
    """Refuses a path where no launch would find the experiment; returns nothing.

    Raises:
        ConfigError: says what is wrong with the path.
    """
    option = one_line(f"--out {out}")
    if out.suffix != ".yaml" or out.parent.name != "experiment":
        raise ConfigError(f"{option}: expected DIR/experiment/NAME.yaml, which `--config-dir DIR experiment=NAME` runs")
    if not NAME.fullmatch(out.stem) or out.stem in choices("experiment"):
        raise ConfigError(f"{option}: {out.stem} is a name of dist_lm's own, or no plain word: choose another name")


def start_of(model: str, name: str) -> Start:
    """Returns the start that `model` names; `name` is that of the files that are written.

    Raises:
        ArtefactError: the model or checkpoint cannot be read.
        ConfigError: the checkpoint writes no text.
        UserError: a package that is needed is not installed.
    """
    from dist_lm.generation.load import run_of, tokenizer_of
    from dist_lm.interop.snapshot import named_model
    from dist_lm.training import checkpoint_files

    if model.startswith(HF):
        source = Path(model.removeprefix(HF)).expanduser()
        # A launch may start elsewhere, so a folder gets its absolute path.
        if source.is_dir():
            model = f"{HF}{source.resolve()}"
        return Start(model, named_model(model), {})

    checkpoint = checkpoint_files.find_checkpoint(Path(model).expanduser())
    shape = ModelConfig(**checkpoint_files.read_state(checkpoint)[1])
    require(shape.head == "tokens", "MODEL", model, "a model that writes text: a reward model gives scores")
    tokenizer = tokenizer_of(checkpoint, None, run_of(checkpoint)).name
    values = {key: value for key, value in asdict(shape).items() if key != "head"} | {"name": name}
    text = f"# The shape of {one_line(str(checkpoint))}\n{yaml.safe_dump(values, sort_keys=False)}"
    path = str(Path(model).expanduser().resolve())
    return Start(path, shape, {"model": name, "tokenizer": str(Path(tokenizer).resolve())}, text)


def _measure(config_dir: Path, name: str, start: Start, measured: Measured) -> Remedy | None:
    """Tries stage sft with long sequences on the first rows, and notes the lengths of conversations (tokens) in
    `measured`.

    The configuration folder gets a model file if `start` has one. Returns what would make the command run; None if it
    runs, or if the corpus file has no conversations.

    Raises:
        UserError: the command must fail.
    """

    def note_lengths(config: Config) -> None:
        work = WorkDirectory(Path(config.work_dir))
        if work.corpus_manifest(CONVERSATIONS).is_file():
            measured.lengths = TokenCorpus.open(work.corpus(CONVERSATIONS), "train").lengths

    # Texts have no such corpus, and are refused with a message of their own.
    if f"\n  {CONVERSATIONS}:\n" not in (config_dir / "corpus" / f"{name}.yaml").read_text(encoding="utf-8"):
        return None
    if start.model_file:
        _write(config_dir / "model" / f"{name}.yaml", start.model_file)
    keys = [f"{key}={value}" for key, value in start.keys.items()]
    length = f"stage.seq_len={start.shape.max_seq_len}"
    overrides = [f"stage={SFT}", f"corpus={name}", *keys, f"stage.init_from={start.init_from}", length]
    # A conversation that is too long must not end the try, whose purpose is the lengths.
    return try_command(config_dir, [*overrides, "stage.too_long=truncate"], note_lengths)


def plan_stages(
    start: Start, name: str, folder: Path, survey: Survey, measured: Measured
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Returns the keys of stage sft by stage, and lines for people that say why.

    Raises:
        ConfigError: the model fits this machine neither whole nor with adapters, not even in four bits.
        UserError: it would fit in four bits at best, and the package for that is not installed.
    """
    from dist_lm.model.size import parameter_count

    n_conversations = survey.documents.total()
    longest = float(np.quantile(measured.lengths, 1 - LONG_SHARE))
    seq_len = sequence_length(longest, start.shape.max_seq_len)
    mean = float(np.minimum(measured.lengths, seq_len).mean())
    n_sequences = max(1, math.ceil(n_conversations * mean / seq_len))
    global_batch = batch_of(n_sequences)
    epochs = EPOCHS_OF_MANY if n_conversations >= MANY else EPOCHS
    steps = max(1, math.ceil(n_sequences * epochs / global_batch))
    n_parameters = parameter_count(start.shape)
    rate = next(rate for least, rate in FULL_RATES if n_parameters >= least)

    keys: dict[str, Any] = {
        "init_from": start.init_from,
        "corpus": CONVERSATIONS,
        "epochs": epochs,
        "seq_len": seq_len,
        "global_batch": global_batch,
        "micro_batch": 1,
        "lr": rate,
        "warmup_steps": max(1, round(WARMUP_SHARE * steps)),
        "eval_every": max(10, steps // 4),
        "checkpoint_every": max(100, steps // 4),
    }
    kind = "the whole model is trained"
    if not fits(folder, name, start, keys):
        keys |= {"lr": LORA_RATE_RATIO * rate, "lora": dict(LORA)}
        kind = "the whole model does not fit this machine, so adapters are trained (LoRA)"
        if not fits(folder, name, start, keys):
            keys["lora"] = LORA | {"load_in_4bit": True}
            kind = "the model fits this machine only in four bits, beside which adapters are trained (QLoRA)"
            if not fits(folder, name, start, keys):
                raise ConfigError(
                    f"{start.init_from}: {readable_count(n_parameters)} parameters do not fit this machine, not even "
                    "in four bits with adapters: take a smaller model, or a machine with more memory"
                )
    lengths = f"mean {mean:,.0f} tokens, 99 % up to {longest:,.0f}"
    length = f"about {counted(steps, 'step')} in {counted(epochs, 'epoch')}"
    remarks = [
        f"{readable_count(n_parameters)} parameters: {kind}",
        f"{n_conversations:,} conversations, {lengths}: stage.seq_len={seq_len}",
        f"about {counted(n_sequences, 'sequence')} an epoch, {global_batch} a step: {length}",
    ]
    return {SFT: keys}, remarks


def sequence_length(longest: float, context: int) -> int:
    """Returns the smallest power of two, at least 256, that holds `longest` tokens; at most `MOST_TOKENS` and the
    context of the model."""
    return min(max(256, 1 << math.ceil(math.log2(max(1.0, longest)))), MOST_TOKENS, context)


def batch_of(n_sequences: int) -> int:
    """Returns the sequences of a step, a power of two within `BATCHES`, that give an epoch about `STEPS_OF_EPOCH`
    steps."""
    smallest, largest = BATCHES
    return min(largest, max(smallest, 1 << int(math.log2(max(1, n_sequences / STEPS_OF_EPOCH)))))


def fits(folder: Path, name: str, start: Start, keys: Mapping[str, Any]) -> bool:
    """Returns whether a step of stage sft with these keys fits the memory of this machine, by the estimate of
    parallel=auto. Files are written to a temporary folder only.

    Args:
        folder: the folder of the recipe's files, called `name`.
        keys: keys of stage sft that are tried.

    Raises:
        ConfigError, UserError: the keys cannot be composed.
    """
    from dist_lm.launch import ranks_here
    from dist_lm.prepare.layout import with_layout

    content = {"corpus": name, "parallel": "auto"} | dict(start.keys) | hardware_keys() | {"stages": {SFT: dict(keys)}}
    with TemporaryDirectory(prefix="dist_lm_recipe_") as temporary:
        _write_copies(folder, name, file_text([], {"stage": SFT} | content), Path(temporary))
        plan = plan_command([f"hydra.searchpath=['{temporary}']", f"experiment={name}", f"work_dir={temporary}/work"])
    config = plan.target.config
    # The steps, which follow from the corpus, do not change the memory.
    config = replace(config, stage=replace(config.stage, steps=1, epochs=0))
    try:
        with_layout(config, ranks_here(config))
    except ConfigError:
        return False
    return True


def hardware_keys() -> dict[str, Any]:
    """Returns the key hardware.memory_gib (GiB of a rank of this machine), nested by groups; empty with GPUs, whose
    memory their file has."""
    import psutil

    from dist_lm.prepare.conf_folders import local_hardware
    from dist_lm.storage.process import cores

    if local_hardware() != "cpu.yaml":
        return {}
    free_gib = psutil.virtual_memory().available / 2**30
    return {"hardware": {"memory_gib": round(max(0.5, USED_MEMORY * free_gib / cores()), 1)}}


def preference_keys(start: Start, sft: Mapping[str, Any], pairs: Survey) -> tuple[dict[str, Any], str]:
    """Returns the keys of stage preference behind stage sft, and a line for people that says why.

    A small file gets small batches and more epochs: in two steps, the rate would not leave its warm-up. Sequences are
    packed with several rankings, whose tokens are estimated from their bytes.

    Args:
        pairs: counts of the rankings in the data, or in the part of it that was read.
    """
    seq_len = min(2 * int(sft["seq_len"]), start.shape.max_seq_len)
    n_pairs = pairs.documents.total()
    # A sequence holds whole rankings, at least one.
    n_sequences = min(n_pairs, math.ceil(pairs.bytes.total() / BYTES_PER_TOKEN / seq_len))
    global_batch = min(PREFERENCE_BATCH, batch_of(n_sequences))
    epochs = EPOCHS_OF_FEW_PAIRS if n_sequences < STEPS_OF_EPOCH * global_batch else 1
    steps = max(1, math.ceil(n_sequences * epochs / global_batch))

    keys: dict[str, Any] = {
        "init_from": f"stage:{SFT}",
        "corpus": RANKINGS,
        "epochs": epochs,
        "seq_len": seq_len,
        "global_batch": global_batch,
        "micro_batch": 1,
        "lr": PREFERENCE_RATE * (LORA_RATE_RATIO if "lora" in sft else 1),
        "warmup_steps": max(1, round(PREFERENCE_WARMUP_SHARE * steps)),
    }
    if "lora" in sft:
        keys["lora"] = dict(sft["lora"])
    data = f"{counted(n_pairs, 'preference')}, about {counted(n_sequences, 'sequence')}"
    line = f"{data}: about {counted(steps, 'step')} in {counted(epochs, 'epoch')}"
    return keys, line


def rlhf_keys(sft: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the keys of stage rlhf behind stage sft."""
    keys: dict[str, Any] = {"init_from": f"stage:{SFT}", "corpus": CONVERSATIONS, "steps": 100}
    if "lora" in sft:
        # Stage rlhf has no dropout: policy and reference must compute alike.
        keys["lora"] = {key: value for key, value in sft["lora"].items() if key != "dropout"}
    return keys


def rlhf_group(prompts: Path, reward: str, sft: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the group `rlhf`: GRPO on the prompts, with the function as the only part of the reward."""
    return {
        "algorithm": "grpo",
        "prompts_from": str(prompts.expanduser().resolve()),
        "lr": RL_RATE * (LORA_RATE_RATIO if "lora" in sft else 1),
        "prompts": 32,
        "reward_model": "none",
        "rewards": {"preference": {"weight": 0}, "mine": {"kind": "function", "function": reward}},
        "max_new_tokens": max(16, int(sft["seq_len"]) // 2),
    }


def survey_of_preferences(preferences: Sequence[str], pair: PairColumns) -> Survey:
    """Returns the counts of the rankings in the first `SAMPLE_BYTES` of text.

    Raises:
        ConfigError, ArtefactError: the preferences cannot be read.
    """
    config = CorpusConfig(name=RANKINGS, corpora={RANKINGS: [SourceConfig(**_source_of(preferences, pair))]})
    return survey(config, RANKINGS, SAMPLE_BYTES)


def _add_rankings(corpus_file: Path, preferences: Sequence[str], pair: PairColumns) -> None:
    """Adds the corpus of preferences to a corpus file that `new_corpus` wrote; its corpora come last."""
    entry = yaml.safe_dump(_source_of(preferences, pair), width=1 << 30, default_flow_style=True)
    _write(corpus_file, f"{corpus_file.read_text(encoding='utf-8')}  {RANKINGS}:\n    - {entry}")


def _source_of(preferences: Sequence[str], pair: PairColumns) -> dict[str, Any]:
    """Returns the source that reads files of preferences, with absolute paths, because a launch may start elsewhere."""
    paths = [path if "://" in path else str(Path(path).expanduser().absolute()) for path in preferences]
    return {"reader": "preferences", "path": paths, "language": "preferences", "licence": ""} | pair.keys()


def _write(path: Path, text: str) -> None:
    """Writes a file of configuration, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    durable.write_text(path, text)


def _write_new(option: str, path: Path, text: str, force: bool) -> None:
    """Writes a file of configuration that was checked to be new, unless `force` replaces it.

    Raises:
        ConfigError: there is such a file by now; it is left as it is.
    """
    if force:
        _write(path, text)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        durable.write_new_text(path, text)
    except FileExistsError:
        raise ConfigError(
            one_line(f"{option} {path}: another process has written this file meanwhile; it is left as it is")
        ) from None


def file_text(comments: Sequence[str], content: Mapping[str, Any]) -> str:
    """Returns the text of an experiment: comments, then keys."""
    lines = [f"# {one_line(comment)}" for comment in comments]
    return "\n".join([*lines, yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True, width=1 << 30)])


def _write_copies(folder: Path, name: str, text: str, temporary: Path) -> None:
    """Writes the experiment `text` into another configuration folder, beside copies of its corpus and model files."""
    _write(temporary / "experiment" / f"{name}.yaml", text)
    for group in ("corpus", "model"):
        file = folder / group / f"{name}.yaml"
        if file.is_file():
            _write(temporary / group / file.name, file.read_text(encoding="utf-8"))


def tried(folder: Path, name: str, comments: Sequence[str], content: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Returns the text of an experiment whose command runs: it is planned, and the first rows of its corpora are built,
    in a temporary folder. Settings that the data needs, such as a larger part for val, are added; the lines that say
    so are returned too.

    Raises:
        UserError: the command must fail.
    """
    content = dict(content)
    reasons: list[str] = []
    for _ in range(MOST_REMEDIES):
        text = file_text([*comments, *reasons], content)
        with TemporaryDirectory(prefix="dist_lm_recipe_") as temporary:
            _write_copies(folder, name, text, Path(temporary))
            remedy = try_command(Path(temporary), [f"experiment={name}"])
        if remedy is None:
            return text, reasons
        if not remedy.settings:
            raise ConfigError(f"{name}: the command would be refused: {remedy.reason}")
        content |= {f"corpus.{key}": value for key, value in remedy.settings.items()}
        reasons.append(remedy.reason)
    raise ConfigError(f"{name}: the command would be refused after {MOST_REMEDIES} settings: give more data")
