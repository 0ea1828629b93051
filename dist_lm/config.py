"""The dataclass of every configuration group, with units and bounds.

`conf/*.yaml` gives the values, these classes give the types: an unknown key or a value of the wrong type is refused
when the configuration is composed, a value out of bounds or a combination that cannot run when it becomes an object.
The launcher composes once; ranks read the resolved file from the run directory.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING, OmegaConf

from dist_lm.cluster_config import ClusterConfig
from dist_lm.errors import ConfigError, require
from dist_lm.hardware_config import HardwareConfig
from dist_lm.pool_config import RolloutPoolConfig
from dist_lm.stage_config import StageConfig

SPLITS = ("train", "val")


@dataclass
class ModelConfig:
    """Shape of the decoder-only transformer."""

    name: str = MISSING
    d_model: int = MISSING  # width of the residual stream
    n_layers: int = MISSING
    n_heads: int = MISSING  # query heads; must divide d_model
    n_kv_heads: int | None = None  # key/value heads (grouped-query attention); none: as many as n_heads
    d_ff: int = MISSING  # hidden width of the feed-forward network
    max_seq_len: int = MISSING  # tokens; longest sequence trained on or generated
    vocab_size: int = MISSING  # pieces of the tokenizer
    norm: str = "layernorm"  # layernorm | rmsnorm
    norm_eps: float = 1e-5
    ffn: str = "gelu"  # gelu | swiglu
    bias: bool = True  # biases in linear layers (and in layernorm)
    tie_embeddings: bool = False  # the output head shares the embedding's weight
    head: str = "tokens"  # tokens (logits of the next one) | scalar (a score a token: reward and value models)
    rope_base: float = 10000.0
    qk_norm: bool = False  # attention compares directions of queries and keys, not lengths: a learned gain a head
    init_std: float = 0.02

    @property
    def d_head(self) -> int:
        return self.d_model // self.n_heads

    @property
    def kv_heads(self) -> int:
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    def __post_init__(self) -> None:
        for key in ("d_model", "n_layers", "n_heads", "d_ff", "max_seq_len", "vocab_size"):
            require(getattr(self, key) > 0, f"model.{key}", getattr(self, key), "a positive integer")
        divisors = [n for n in range(1, self.d_model + 1) if self.d_model % n == 0 and self.d_model // n % 2 == 0]
        near = sorted(divisors, key=lambda n: abs(n - self.n_heads))[:6]
        require(
            self.n_heads in divisors,
            "model.n_heads",
            self.n_heads,
            f"a divisor of model.d_model={self.d_model} with an even head width, such as {sorted(near)}",
        )
        require(
            self.kv_heads > 0 and self.n_heads % self.kv_heads == 0,
            "model.n_kv_heads",
            self.n_kv_heads,
            f"a divisor of model.n_heads={self.n_heads}",
        )
        require(self.vocab_size <= 65536, "model.vocab_size", self.vocab_size, "at most 65536 (tokens are uint16)")
        for key in ("norm_eps", "rope_base", "init_std"):
            require(getattr(self, key) > 0, f"model.{key}", getattr(self, key), "a positive number")
        require(self.norm in ("layernorm", "rmsnorm"), "model.norm", self.norm, "layernorm or rmsnorm")
        require(self.ffn in ("gelu", "swiglu"), "model.ffn", self.ffn, "gelu or swiglu")
        require(self.head in ("tokens", "scalar"), "model.head", self.head, "tokens or scalar")


@dataclass
class ParallelConfig:
    """How one model is spread over ranks. -1 means: what is left of the world."""

    dp_replicate: int = 1  # replicas (DDP, or the outer axis of HSDP)
    dp_shard: int = -1  # ranks that share one copy of parameters, gradients and optimizer state (FSDP)
    tp: int = 1  # ranks that share the attention heads, the feed-forward width and the vocabulary of one layer
    sp: bool = False  # norms, dropout and residuals hold 1/tp of the tokens of a sequence (sequence parallelism)
    reshard_after_forward: bool | None = None  # free gathered parameters before the backward pass; null: if over 64 MiB
    reduce_every_micro_batch: bool = False  # reduce gradients after each micro-batch: sends more, holds only shards
    # auto (bf16 on CUDA, fp32 on CPU) | fastest (bf16 on CPUs that multiply it too) | fp32 | bf16
    compute_dtype: str = "auto"
    activation_checkpointing: str = "none"  # none | selective (keep matmul and attention outputs) | full (keep inputs)
    compile: str = "auto"  # torch.compile of each block: auto (on CUDA) | always | never
    cpu_offload: bool = False  # parameters, gradients and optimizer state live in host memory
    loss_chunk_mib: int = 256  # largest block of fp32 logits; the loss takes as many tokens at a time as fit
    # choose by the estimate of a step: axes that are -1, and of sp, activation_checkpointing, reshard_after_forward and
    # reduce_every_micro_batch those at their default
    auto: bool = False

    def __post_init__(self) -> None:
        for key in ("dp_replicate", "dp_shard", "tp"):
            value = getattr(self, key)
            require(
                value == -1 or value > 0,
                f"parallel.{key}",
                value,
                "a positive integer, or -1 for what is left",
            )
        for key, accepted in (
            ("compute_dtype", ("auto", "fastest", "fp32", "bf16")),
            ("activation_checkpointing", ("none", "selective", "full")),
            ("compile", ("auto", "always", "never")),
        ):
            value = getattr(self, key)
            require(value in accepted, f"parallel.{key}", value, f"{', '.join(accepted[:-1])} or {accepted[-1]}")
        require(self.loss_chunk_mib > 0, "parallel.loss_chunk_mib", self.loss_chunk_mib, "a positive number of MiB")
        require(
            not self.sp or self.tp != 1 or self.auto,
            "parallel.sp",
            self.sp,
            "false with parallel.tp=1 (it splits over tp)",
        )


# subjects, in the order in which one helps with the next
DRILLS = ("copying", "lists", "wishes", "choosing", "slots", "filling")


@dataclass
class SourceConfig:
    """Where documents of one language come from."""

    # english | python | bash | sql | tools (made on this machine) | hub | hub_tools | rankings (one's own files) |
    # hub_rankings | synthetic_rankings (samples of the model, by rules)
    reader: str = MISSING
    language: str = MISSING  # english | python | bash | sql | tools; of rankings the name that figures have
    licence: str = ""
    limit: int = 0  # documents; 0: all
    dataset: str = ""  # hub...: dataset id, or a local folder or file with the same columns; rankings: file or glob
    revision: str = "main"  # hub
    subset: str | None = None  # hub: configuration name of the data set; drills: one of DRILLS (null: copying)
    data_dir: str | None = None  # hub: folder inside the data set
    split: str = "train"  # hub: split of the data set (train/val is ours, by document hash)
    column: str = "text"  # hub: the column that holds the document
    licence_column: str = ""  # hub: the column that holds the licence of each row; none: `licence` for all
    rows: str = ""  # hub_rankings: oasst1 | hh-rlhf | helpsteer3 | ultrafeedback; none: by the name of the data set
    only: list[str] = field(default_factory=list)  # hub_rankings of oasst1: languages that are kept (en); none: all

    def __post_init__(self) -> None:
        require(
            "@" not in self.dataset.partition("://")[2].partition("/")[0],
            f"corpus source {self.reader}: dataset",
            "(an address with a password)",
            "an address without one (give a token in HF_TOKEN); the configuration is written to disk",
        )
        require(
            self.reader != "drills" or self.subset in (None, *DRILLS),
            "corpus source drills: subset",
            self.subset,
            ", ".join(DRILLS),
        )
        require(
            self.limit >= 0,
            f"corpus source {self.reader}: limit",
            self.limit,
            "0 (all) or a positive integer",
        )


def _source(item: Any) -> SourceConfig:
    typed = item if isinstance(item, SourceConfig) else OmegaConf.merge(OmegaConf.structured(SourceConfig), item)
    source = OmegaConf.to_object(OmegaConf.structured(typed))
    assert isinstance(source, SourceConfig)
    return source


@dataclass
class CorpusConfig:
    """The documents of every corpus, by corpus name."""

    name: str = MISSING  # local | hub
    corpora: dict[str, list[SourceConfig]] = field(default_factory=dict)
    val_fraction: float = 0.02  # share of documents kept out of training, chosen by hash
    max_document_bytes: int = 1_000_000  # longer documents are dropped and counted
    documents_per_member: int = 256  # documents grouped in one member of a tar
    shard_tokens: int = 64_000_000  # tokens a tar

    def __post_init__(self) -> None:
        # OmegaConf checks the types of dataclasses inside a list, but not of those in a list inside a mapping
        self.corpora = {name: [_source(item) for item in sources] for name, sources in self.corpora.items()}
        require(0 < self.val_fraction < 1, "corpus.val_fraction", self.val_fraction, "in (0, 1)")
        require(self.documents_per_member > 0, "corpus.documents_per_member", self.documents_per_member, ">= 1")
        require(self.shard_tokens > 0, "corpus.shard_tokens", self.shard_tokens, ">= 1")


@dataclass
class TokenizerConfig:
    """How the SentencePiece BPE is trained."""

    vocab_size: int = MISSING  # pieces, special ones included
    train_bytes: int = 200_000_000  # text sampled for training; the same share of every language
    workers: int = 0  # processes that encode; 0: all cores

    def __post_init__(self) -> None:
        require(
            512 <= self.vocab_size <= 65536,
            "tokenizer.vocab_size",
            self.vocab_size,
            "512 to 65536 (256 byte pieces, special tokens, and tokens that fit uint16)",
        )
        require(self.train_bytes > 0, "tokenizer.train_bytes", self.train_bytes, "a positive number of bytes")
        require(self.workers >= 0, "tokenizer.workers", self.workers, "0 (all cores) or a positive integer")


@dataclass
class TrackingConfig:
    """Who is told about the metrics, besides metrics.jsonl."""

    name: str = MISSING  # wandb | none
    project: str = "dist_lm"
    entity: str | None = None
    mode: str = "auto"  # auto (online with a key, else offline) | online | offline
    tags: list[str] = field(default_factory=list)
    finish_s: float = 30.0  # online: how long the end of a run waits for a server that answers

    def __post_init__(self) -> None:
        require(self.finish_s >= 0, "tracking.finish_s", self.finish_s, ">= 0 seconds")
        require(self.name in ("wandb", "none"), "tracking.name", self.name, "wandb or none")
        require(self.mode in ("auto", "online", "offline"), "tracking.mode", self.mode, "auto, online or offline")


@dataclass
class Config:
    """The whole resolved configuration."""

    seed: int = 0
    work_dir: str = "work"
    run_id: str = "default"
    device: str = "auto"  # auto | cpu | cuda
    prerequisites: str = "build"  # build what is missing | fail and name the command
    dry_run: bool = False
    model: ModelConfig = MISSING
    parallel: ParallelConfig = MISSING
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    stage: StageConfig = MISSING
    corpus: CorpusConfig = MISSING
    tokenizer: TokenizerConfig = MISSING
    cluster: ClusterConfig = MISSING
    tracking: TrackingConfig = MISSING

    def __post_init__(self) -> None:
        require(self.device in ("auto", "cpu", "cuda"), "device", self.device, "auto, cpu or cuda")
        require(self.prerequisites in ("build", "fail"), "prerequisites", self.prerequisites, "build or fail")
        require(
            bool(self.run_id) and Path(self.run_id).name == self.run_id and not self.run_id.startswith("."),
            "run_id",
            self.run_id,
            "a plain name (it becomes a folder)",
        )
        require(
            self.tokenizer.vocab_size == self.model.vocab_size,
            "tokenizer.vocab_size",
            self.tokenizer.vocab_size,
            f"model.vocab_size={self.model.vocab_size}, which it follows: set that one",
        )
        self.check_stage()

    @property
    def pool(self) -> RolloutPoolConfig | None:
        """Of the actors that a rank drives, where the stage has any."""
        return None

    @property
    def takes_sequences(self) -> bool:
        """Whether a step is stage.global_batch sequences of stage.seq_len tokens."""
        return True

    @property
    def sequence_keys(self) -> tuple[str, str] | None:
        """(how many sequences an update takes over all ranks, tokens of one): the keys that say so, where it does."""
        return "stage.global_batch", "stage.seq_len"

    @property
    def streams(self) -> tuple[str, ...]:
        """The corpora that it reads."""
        return self.stage.streams

    @property
    def trained_models(self) -> int:
        """That a checkpoint holds, of the size of `model`."""
        return 1

    @property
    def not_needed(self) -> tuple[str, ...]:
        """Stages that this one needs by default, but not as it is configured."""
        return ()

    def check_stage(self) -> None:
        """Refuse keys of the stage that do not go with other groups."""
        require(
            self.stage.corpus in ("", *self.corpus.corpora),
            "stage.corpus",
            self.stage.corpus,
            f"one of the corpora of corpus={self.corpus.name}: {', '.join(self.corpus.corpora)}",
        )
        own = self.stage.corpus
        others = [name for name in self.corpus.corpora if own and name != own]
        accepted = f"corpora of corpus={self.corpus.name} beside stage.corpus={own}: {', '.join(others)}"
        for name, share in (self.stage.mix or {}).items():
            if name not in self.corpus.corpora:
                raise ConfigError(f"stage.mix={{{name}: {share:g}}}: there is no corpus {name}; expected {accepted}")
            require(name in others, "stage.mix", name, accepted)
        free = {*others} - {*(self.stage.mix or {})}
        for lead in self.stage.lead:
            require(
                lead.corpus in free,
                "stage.lead: corpus",
                lead.corpus,
                f"a corpus of corpus={self.corpus.name} that is neither stage.corpus={own} nor in stage.mix, each once",
            )
            free.remove(lead.corpus)
        for name in self.stage.corpora or []:
            require(name in self.corpus.corpora, "stage.corpora", name, f"some of {', '.join(self.corpus.corpora)}")
        require(
            self.stage.seq_len <= self.model.max_seq_len,
            "stage.seq_len",
            self.stage.seq_len,
            f"at most model.max_seq_len={self.model.max_seq_len}",
        )
