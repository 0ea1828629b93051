"""The conf group `stage`: keys that several stages share. A stage adds its own beside its class.

StageGroup      every stage
TrainingGroup   every stage that trains on ranks; all that stage rlhf has
TrainerGroup    steps on sequences of tokens: stages reward and preference
StageConfig     steps on texts and conversations: stages language, code, tools

OptimizerConfig and SamplingConfig hold keys that the group `rlhf` has, too.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from omegaconf import MISSING

from dist_lm.config.evaluation import LOOP_TASKS
from dist_lm.config.phases import PhaseConfig, check_phases
from dist_lm.errors import require

COSINE, WSD, LINEAR = "cosine", "wsd", "linear"
DECAYS = ("1-sqrt", "linear")


@dataclass
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter 2019), its learning rate and the clipping of gradients."""

    lr: float = 1e-4  # peak learning rate
    min_lr_ratio: float = 0.1  # final learning rate / peak
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    adam_eps: float = 1e-8
    grad_clip: float = 1.0  # largest global gradient norm; 0: off

    def check_optimizer(self, group: str) -> None:
        """Refuses values out of bounds; `group` is the group of the configuration that has these keys.

        Raises:
            ConfigError: names the key and what would be accepted.
        """
        for key in ("lr", "adam_eps"):
            require(0 < getattr(self, key) < math.inf, f"{group}.{key}", getattr(self, key), "a positive number")
        require(0 <= self.min_lr_ratio <= 1, f"{group}.min_lr_ratio", self.min_lr_ratio, "in [0, 1]")
        require(0 <= self.weight_decay < math.inf, f"{group}.weight_decay", self.weight_decay, ">= 0")
        for key in ("beta1", "beta2"):
            require(0 <= getattr(self, key) < 1, f"{group}.{key}", getattr(self, key), "in [0, 1)")
        require(0 <= self.grad_clip < math.inf, f"{group}.grad_clip", self.grad_clip, ">= 0 (0 is off)")


@dataclass
class SamplingConfig:
    """How the tokens of a completion are drawn."""

    max_new_tokens: int = 128  # longest completion
    temperature: float = 1.0  # divides the logits; 0: greedy
    top_k: int = 0  # draw only from the k likeliest tokens; 0: off
    top_p: float = 1.0  # draw only from the smallest set of tokens with this probability; 1: off

    def check_sampling(self, group: str) -> None:
        """Refuses values out of bounds; `group` is the group of the configuration that has these keys.

        Raises:
            ConfigError: names the key and what would be accepted.
        """
        require(self.max_new_tokens > 0, f"{group}.max_new_tokens", self.max_new_tokens, "a positive integer")
        require(self.temperature >= 0, f"{group}.temperature", self.temperature, ">= 0 (0 is greedy)")
        require(self.top_k >= 0, f"{group}.top_k", self.top_k, ">= 0 (0 is off)")
        require(0 < self.top_p <= 1, f"{group}.top_p", self.top_p, "in (0, 1]")


def check_shares(key: str, shares: Mapping[str, float], own: str) -> None:
    """Refuses shares of mixed corpora that are no whole per cents between 0 and 1 (both excluded), or sum up to 1 or
    more, so that nothing is left to the corpus of the stage; returns nothing.

    Args:
        key: the key of `shares` for messages.
        shares: share of all sequences by corpus.
        own: the key of the corpus that gets the rest.

    Raises:
        ConfigError: names the corpus and its share, or the sum of all shares.
    """
    for name, share in shares.items():
        accepted = "below 1, in whole per cent, such as 0.15 (0: none of it)"
        is_whole = 0 < share < 1 and abs(share * 100 - round(share * 100)) < 1e-9
        require(is_whole, f"{key}.{name}", share, accepted)

    # A sum of floating-point shares may miss 1 by its rounding.
    total = sum(shares.values())
    require(round(total, 9) < 1, key, f"{total:g} in all", f"below 1, so that {own} has a share")


@dataclass
class RatesConfig:
    """Peak learning rates of groups of parameters, as multiples of `stage.lr`. Weight decay is that of `stage.lr`."""

    embedding: float = 1.0  # and a head tied to it
    head: float = 1.0
    matrices: float = 1.0  # inside blocks
    vectors: float = 1.0  # norms, biases, scalars of model.value_residual

    def __post_init__(self) -> None:
        for key, value in vars(self).items():
            require(0 < value < math.inf, f"stage.rates.{key}", value, "a positive number")


UNIT, ADAMW = "unit", "adamw"


@dataclass
class MuonConfig:
    """Muon for the matrices inside blocks; embedding, head, norms and biases stay with AdamW."""

    lr: float | None = 0.0  # peak learning rate of these matrices, times stage.rates.matrices; null: stage.lr; 0: off
    # unit: a step moves each singular direction of a matrix by the rate, which is about 0.02 | adamw: a step moves the
    # entries as far as AdamW moves them at the same rate (Liu et al. 2025)
    scale: str = UNIT
    weight_decay: float | None = None  # null: stage.weight_decay
    momentum: float = 0.95
    momentum_low: float = 0.85  # at the start of the warm-up and at the end of the cool-down
    momentum_warmup_steps: int = 0  # linear, from momentum_low to momentum
    momentum_cooldown_steps: int = 0  # linear, the last steps, back to momentum_low
    # NorMuon (Li et al. 2025): decay of the mean square of the steps of a neuron, by which its step is divided; 0: off
    variance_beta: float = 0.0

    @property
    def is_on(self) -> bool:
        """Whether Muon steps the matrices."""
        return self.lr is None or self.lr > 0

    def __post_init__(self) -> None:
        """Refuses values out of their range.

        Raises:
            ConfigError: names the key, its value and what is accepted.
        """
        require(self.lr is None or 0 <= self.lr < math.inf, "stage.muon.lr", self.lr, "null, or >= 0 (0 is off)")
        require(self.scale in (UNIT, ADAMW), "stage.muon.scale", self.scale, f"{UNIT} or {ADAMW}")
        decay = self.weight_decay
        require(decay is None or decay >= 0, "stage.muon.weight_decay", decay, "null (stage.weight_decay) or >= 0")
        for key in ("momentum", "momentum_low", "variance_beta"):
            require(0 <= getattr(self, key) < 1, f"stage.muon.{key}", getattr(self, key), "in [0, 1)")
        for key in ("momentum_warmup_steps", "momentum_cooldown_steps"):
            require(getattr(self, key) >= 0, f"stage.muon.{key}", getattr(self, key), "0 or a positive integer")


LORA_TARGETS = {  # target -> the weights of a block
    "attention": ("query", "key", "value", "output"),
    "feed_forward": ("gate", "up", "down"),
}


NEEDS_BITSANDBYTES = "stage.lora.load_in_4bit=true needs the package bitsandbytes: pip install 'dist_lm[qlora]'"


@dataclass
class LoraConfig:
    """LoRA (Hu et al. 2021, arXiv 2106.09685): a weight W of the frozen base becomes W + alpha / rank * B A, and only
    A and B are trained, by AdamW."""

    rank: int = 0  # rows of A; 0: off
    alpha: float = 16.0
    # attention | feed_forward | query | key | value | output | gate | up | down
    targets: list[str] = field(default_factory=lambda: list(LORA_TARGETS))
    rslora: bool = False  # the scale is alpha / sqrt(rank) (Kalajdzievski 2023, arXiv 2312.03732)
    dropout: float = 0.0  # share of the entries of an adapter's input that are dropped in training
    # names of special tokens whose rows of the embedding (and of an untied head) are trained too: those that the base
    # has never seen, such as <|im_start|> of a model without conversations
    tokens: list[str] = field(default_factory=list)
    # QLoRA (Dettmers et al. 2023, arXiv 2305.14314): the frozen matrices of blocks are in NF4, with double quantisation
    # (package bitsandbytes); every rank holds all of them, so ranks are replicas
    load_in_4bit: bool = False

    def __post_init__(self) -> None:
        require(self.rank >= 0, "stage.lora.rank", self.rank, "0 (off) or a positive integer")
        require(0 < self.alpha < math.inf, "stage.lora.alpha", self.alpha, "a positive number")
        require(0 <= self.dropout < 1, "stage.lora.dropout", self.dropout, "in [0, 1)")
        for key, off in (("dropout", "0"), ("tokens", "none"), ("load_in_4bit", "false")):
            accepted = f"{off} without stage.lora.rank"
            require(self.rank > 0 or not getattr(self, key), f"stage.lora.{key}", getattr(self, key), accepted)
        weights = [weight for part in LORA_TARGETS.values() for weight in part]
        choices = ", ".join([*LORA_TARGETS, *weights])
        for target in self.targets:
            require(target in (*LORA_TARGETS, *weights), "stage.lora.targets", target, f"some of {choices}")
        require(bool(self.targets), "stage.lora.targets", self.targets, f"at least one of {choices}")


@dataclass
class StageGroup:
    """The group `stage` of every stage. A stage adds the keys that it reads, and no others.

    The class variables are what a stage has in place of keys that it does not read.
    """

    name: str = MISSING

    init_from: ClassVar[str] = "none"
    branch_from: ClassVar[str] = ""
    without: ClassVar[str] = ""
    eval_tasks: ClassVar[Mapping[str, int]] = {}

    def sampled_by(self) -> dict[str, Any]:
        """Returns the settings for documents that a model generates in this stage; part of their fingerprint."""
        return {}

    @property
    def corpus_names(self) -> tuple[str, ...]:
        """Names of the corpora that the stage trains on."""
        return ()


@dataclass
class TrainingGroup(StageGroup):
    """The group `stage` of every stage that trains a model on ranks."""

    corpus: str = ""  # name of a corpus in work/corpora
    # origin of the weights: auto (the previous stage) | none | a run directory, a checkpoint, or RUN@STEP |
    # stage:NAME: the run of an earlier stage with the same run_id, built if it is missing |
    # hf:FOLDER or hf:ID: a model of transformers, imported first, whose model and tokenizer the stage then has
    init_from: str = "auto"  # pyright: ignore[reportIncompatibleVariableOverride]
    steps: int = 1000  # optimizer steps; of a branch: with those of the run that it continues
    lora: LoraConfig = field(default_factory=LoraConfig)
    checkpoint_every: int = 500  # steps; 0: only at the end
    checkpoint_async: bool = True  # write checkpoints beside training, from a copy in host memory, one at a time
    keep_checkpoints: int = 3  # newest ones kept; BEST is always kept
    eval_every: int = 500  # steps; 0: only at the end
    # tasks of stage evaluate during training: name -> steps between two evaluations (0: only after the last step);
    # greedy, one answer a question (docs/eval_tasks.md)
    eval_tasks: dict[str, int] = field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default_factory=dict
    )
    eval_new_tokens: int = 512  # longest answer to their questions about code
    log_every: int = 1  # steps

    epochs: ClassVar[float] = 0.0
    phases: ClassVar[Sequence[PhaseConfig]] = ()
    ema_decay: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        """Refuses counts of steps, checkpoints and evaluations out of their range, and unknown tasks in `eval_tasks`.

        Raises:
            ConfigError: names the key, its value and what is accepted.
        """
        for key in ("steps", "keep_checkpoints", "eval_new_tokens", "log_every"):
            # Steps that follow from epochs are not known before the corpus is there.
            if key == "steps" and self.epochs and self.steps == 0:
                continue
            require(getattr(self, key) > 0, f"stage.{key}", getattr(self, key), "a positive integer")
        for key in ("checkpoint_every", "eval_every"):
            require(getattr(self, key) >= 0, f"stage.{key}", getattr(self, key), "0 or a positive integer")
        for task, every in self.eval_tasks.items():
            require(task in LOOP_TASKS, "stage.eval_tasks", task, f"some of {', '.join(LOOP_TASKS)}")
            require(every >= 0, f"stage.eval_tasks.{task}", every, "0 (only at the end) or a positive number of steps")

    @property
    def corpus_names(self) -> tuple[str, ...]:
        return (self.corpus,) if self.corpus else ()


@dataclass
class TrainerGroup(OptimizerConfig, TrainingGroup):
    """The group `stage` of a stage whose steps `dist_lm.training.trainer` takes on sequences of tokens."""

    # RUN@STEP of this stage that the run continues under another schedule: weights, optimizer, step, place in the data
    branch_from: str = ""  # pyright: ignore[reportIncompatibleVariableOverride]
    # passes over `corpus`, in place of steps, which follow before the first one (rounded up); 0: steps count
    epochs: float = 0.0  # pyright: ignore[reportIncompatibleVariableOverride]
    seq_len: int = 256  # tokens
    global_batch: int = 16  # sequences per step over all ranks
    micro_batch: int = 8  # sequences per forward pass of a rank
    warmup_steps: int = 100
    # after the warm-up: cosine | wsd (constant, then a decay over the last decay_steps) | linear (constant, then linear
    # over the last decay_share)
    schedule: str = "cosine"
    decay_steps: int = 0  # steps of the decay of wsd; 0: constant to the end
    decay: str = "1-sqrt"  # form of the decay of wsd: 1-sqrt | linear
    decay_share: float = 0.65  # share of the steps that schedule linear decays over; 1: all after the warm-up
    rates: RatesConfig = field(default_factory=RatesConfig)
    muon: MuonConfig = field(default_factory=MuonConfig)
    # decay of the exponential average of the weights, which checkpoints hold and evaluations measure too; 0: none
    ema_decay: float = 0.0  # pyright: ignore[reportIncompatibleVariableOverride]
    dropout: float = 0.0
    max_nonfinite_steps: int = 10  # consecutive steps with NaN/inf gradients before the run stops
    eval_at_start: bool = False  # evaluate before the first step too, with all of val
    eval_sequences: int = 256  # val sequences in an evaluation on the way; 0: all. The last one always takes all

    document_mask: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_optimizer("stage")
        for key in ("seq_len", "global_batch", "micro_batch", "max_nonfinite_steps"):
            require(getattr(self, key) > 0, f"stage.{key}", getattr(self, key), "a positive integer")
        for key in ("warmup_steps", "eval_sequences"):
            require(getattr(self, key) >= 0, f"stage.{key}", getattr(self, key), "0 or a positive integer")
        require(0 <= self.epochs < math.inf, "stage.epochs", self.epochs, "a positive number of passes, or 0 (off)")
        require(not self.epochs or bool(self.corpus), "stage.epochs", self.epochs, "0 without stage.corpus")
        self._check_schedule()
        require(0 <= self.dropout < 1, "stage.dropout", self.dropout, "in [0, 1)")
        require(0 <= self.ema_decay < 1, "stage.ema_decay", self.ema_decay, "in [0, 1) (0 is off)")

    def _check_schedule(self) -> None:
        """Refuses an unknown schedule or form of decay, a share outside (0, 1], a decay that is longer than the steps
        after the warm-up, and `decay_steps` with a schedule that does not read it.

        Raises:
            ConfigError: names the key and what would be accepted.
        """
        schedules = f"{COSINE}, {LINEAR}, or {WSD} (constant with stage.decay_steps=0)"
        require(self.schedule in (COSINE, WSD, LINEAR), "stage.schedule", self.schedule, schedules)
        require(0 < self.decay_share <= 1, "stage.decay_share", self.decay_share, "in (0, 1]")
        require(self.decay in DECAYS, "stage.decay", self.decay, " or ".join(DECAYS))

        if self.epochs and not self.steps:  # compared when the steps are known
            return
        # Other schedules do not read decay_steps, so they take 0 alone.
        longest = max(0, self.steps - self.warmup_steps) if self.schedule == WSD else 0
        accepted = f"at most {longest}, the steps after the warm-up (0 unless stage.schedule={WSD})"
        require(0 <= self.decay_steps <= longest, "stage.decay_steps", self.decay_steps, accepted)


@dataclass
class StageConfig(TrainerGroup):
    """The group `stage` of a stage that predicts the next token of texts and conversations."""

    mix: dict[str, float] | None = field(default_factory=dict)  # share of the sequences from other corpora, by name
    # in place of mix: parts of the run with a mix of all corpora each (docs/mixtures.md)
    phases: list[PhaseConfig] = field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default_factory=list
    )
    max_epochs: dict[str, float] = field(default_factory=dict)  # most passes over a corpus in all phases, by name
    label_smoothing: float = 0.0
    z_loss: float = 0.0  # weight of the squared log-normaliser of the logits; 0: off
    document_mask: bool = True  # attention stays inside a slice: the part of a document that a sequence holds
    reset_positions: bool = True  # positions start at 0 in each slice, also in one that continues a document
    # conversations longer than seq_len: drop (left out) | truncate (their beginning) | split (pieces, which do not see
    # one another)
    too_long: str = "drop"
    # file of documents whose loss does not count, CORPUS:NUMBER a line (docs/provenance.md); "": none
    without: str = ""  # pyright: ignore[reportIncompatibleVariableOverride]
    # what an epoch of texts shuffles: documents | units (up to 64 neighbours; for hundreds of millions of documents) |
    # windows (units inside windows of 2**28 tokens; for remote corpora that are larger than their cache)
    order: str = "documents"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.label_smoothing < 1, "stage.label_smoothing", self.label_smoothing, "in [0, 1)")
        require(self.z_loss >= 0, "stage.z_loss", self.z_loss, ">= 0 (0 is off)")
        require(
            self.too_long in ("drop", "truncate", "split"), "stage.too_long", self.too_long, "drop, truncate or split"
        )
        accepted = "none with stage.document_mask=false: documents that see these learn from them"
        require(self.document_mask or not self.without, "stage.without", self.without, accepted)
        require(
            self.order in ("documents", "units", "windows"), "stage.order", self.order, "documents, units or windows"
        )

        # a file of one's own can take out what the file that it varies mixes in
        self.mix = {name: share for name, share in (self.mix or {}).items() if share}
        check_shares("stage.mix", self.mix, own="stage.corpus")
        if self.phases:
            self._check_phases()
        for name, most in self.max_epochs.items():
            require(0 < most < math.inf, f"stage.max_epochs.{name}", most, "a positive number of passes")
            accepted = f"corpora of stage.phases: {', '.join(self.phased_corpora) or 'there are no phases'}"
            require(name in self.phased_corpora, "stage.max_epochs", name, accepted)

    def _check_phases(self) -> None:
        """Refuses phases that no run can have, and keys beside them that say the same in another way.

        Raises:
            ConfigError: names the key and what would be accepted.
        """
        require(not self.mix, "stage.mix", self.mix, "null with stage.phases, whose mixes name every corpus")
        require(not self.epochs, "stage.epochs", self.epochs, "stage.steps with stage.phases")
        check_phases(self.phases, self.steps)
        accepted = f"stage.corpus={self.corpus} in at least one phase"
        require(self.corpus in self.phased_corpora, "stage.phases", f"mixes of {self.phased_corpora}", accepted)

    @property
    def phased_corpora(self) -> list[str]:
        """Names of the corpora in `phases`, sorted."""
        return sorted({name for phase in self.phases for name in phase.mix})

    @property
    def corpus_names(self) -> tuple[str, ...]:
        """Names of the corpora that the stage trains on: `corpus`, then those in `mix` or in `phases`."""
        mixed_names = {*(self.mix or {}), *self.phased_corpora} - {self.corpus}
        return tuple(name for name in (self.corpus, *sorted(mixed_names)) if name)
