"""The conf group `model`: the shape of the transformer."""

import math
from dataclasses import dataclass, field, fields, replace
from typing import ClassVar, Self

from omegaconf import MISSING

from dist_lm.config.stage import LORA_TARGETS, LoraConfig
from dist_lm.errors import require

UNGATED, GATED = ("gelu", "gelu_tanh", "relu2"), ("swiglu", "geglu", "geglu_tanh")
"""Values of `model.ffn`."""

COMPUTE_DTYPE, WIDE_LOGITS = "compute", "fp32"  # values of `model.head_dtype`

LAYER_LISTS = ("full_layers", "rope_free_layers")  # keys that list layers

EXPORTED = (
    "gpt_neox",
    "starcoder2",
    "arcee",
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "ministral",
    "smollm3",
    "phi3",
    "granite",
    "olmo2",
)
"""Values of `model.export_as`."""


@dataclass
class ModelConfig:
    """Shape of the decoder-only transformer."""

    name: str = MISSING
    d_model: int = MISSING  # width of the residual stream
    n_layers: int = MISSING
    n_heads: int = MISSING  # query heads; must divide d_model, unless head_width is set
    head_width: int | None = None  # width of queries, keys and values of one head, even; null: d_model / n_heads
    n_kv_heads: int | None = None  # key/value heads (grouped-query attention); null: n_heads
    d_ff: int = MISSING  # hidden width of the feed-forward network
    max_seq_len: int = MISSING  # tokens; longest sequence trained on or generated
    vocab_size: int = MISSING  # pieces of the tokenizer
    norm: str = "layernorm"  # layernorm | rmsnorm
    norm_eps: float = 1e-5
    # feed-forward network: gelu | gelu_tanh (GELU by tanh) | relu2 (squared ReLU, So et al. 2021), or with a gate
    # (Shazeer 2020): swiglu | geglu | geglu_tanh
    ffn: str = "gelu"
    bias: bool = True  # biases in linear layers (and in layernorm)
    attention_bias: bool | None = None  # biases of queries, keys, values and the output of attention; null: as bias
    ffn_bias: bool | None = None  # biases in the feed-forward network; null: as bias
    qkv_bias: bool = False  # biases for queries, keys and values although the output of attention has none (as Qwen2)
    tie_embeddings: bool = False  # the output head shares the embedding's weight
    head: str = "tokens"  # tokens (logits of the next token) | scalar (one score per token: reward and value models)
    rope_base: float = 10000.0
    rotary_fraction: float = 1.0  # share of each head, its first entries, that RoPE rotates (as Pythia)
    # lower frequencies, for sequences longer than those of the first training; none | linear (Chen et al. 2023): all
    # divided by rope_factor | llama3 (Grattafiori et al. 2024): divided are those with at most rope_low_freq_factor
    # periods in rope_original_len tokens, those with at least rope_high_freq_factor are kept, others lie between | yarn
    # (Peng et al. 2023): the same with rope_beta_slow and rope_beta_fast, in steps of one pair of entries
    rope_scaling: str = "none"
    rope_factor: float = 1.0  # at least 1
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0
    rope_original_len: int = 8192
    rope_beta_fast: float = 32.0
    rope_beta_slow: float = 1.0
    rope_truncate: bool = True  # whether the bounds of yarn are rounded to whole pairs
    rope_attention_factor: float | None = None  # yarn multiplies queries and keys; null: 0.1 ln(rope_factor) + 1
    rope_free_layers: list[int] = field(default_factory=list)  # layers, from 0, without RoPE (Kazemnejad et al. 2023)
    window: int | None = None  # tokens that a query sees, its own among them (Beltagy et al. 2020); null: all before it
    full_layers: list[int] = field(default_factory=list)  # layers, from 0, without the window
    parallel_residual: bool = False  # the feed-forward network reads the input of attention, not its sum (as Pythia)
    qk_norm: bool = False  # RMSNorm of queries and keys before RoPE
    # head: over d_head, with one weight for all heads (as Qwen3) | all: over all heads, with a weight of each (OLMo 2)
    qk_norm_span: str = "head"
    # norms of a block: before (Radford et al. 2019) | after attention and the feed-forward network (as OLMo 2)
    norm_place: str = "before"
    # values of the layers after the first: a v + b v_1 with v_1 of the first layer; a and b are learned scalars of each
    # layer and start at 0.5 (Zhou et al. 2024)
    value_residual: bool = False
    # constants of Granite (Granite Team 2024, from muP): factors of the embedding and of what each branch adds to the
    # residual stream, the factor of attention scores (null: 1 / sqrt(d_head)), and the divisor of logits
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    attention_scale: float | None = None
    logit_divisor: float = 1.0
    # dtype of logits where passes are in bf16: compute (that of the passes) | fp32 (products of bf16 numbers, added and
    # kept in fp32: log-probabilities of trainer and engine then differ less)
    head_dtype: str = "compute"
    logit_cap: float = 0.0  # c: logits are c tanh(logits / c) (Gemma Team 2024, section 2); 0: off
    init_std: float = 0.02
    # initial values of the projections onto the residual stream: zero | depth: deviation of init_std / sqrt(2 n_layers)
    # (Radford et al. 2019)
    residual_init: str = "depth"
    # width that init_std and the learning rates are meant for: other widths scale them (muP, Yang & Hu 2022, table 3),
    # so one rate serves all of them. Heads have the same width, d_ff grows with d_model. null: no scaling
    base_width: int | None = None
    # model_type of the class of transformers that exports have, where several hold the model; null: the first of them
    export_as: str | None = None

    lora: ClassVar[LoraConfig | None] = None  # set in `AdaptedModelConfig`
    is_in_4bit: ClassVar[bool] = False  # whether the matrices of blocks are frozen, in four bits (`model.quantised`)

    @property
    def plain(self) -> "ModelConfig":
        """The model without adapters."""
        return self

    @property
    def d_head(self) -> int:
        """Width of one head."""
        return self.head_width or self.d_model // self.n_heads

    @property
    def kv_heads(self) -> int:
        """Number of heads of keys and values."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def relative_width(self) -> float:
        """d_model / base_width; 1 without base_width."""
        return self.d_model / (self.base_width or self.d_model)

    @property
    def rotary_width(self) -> int:
        """Entries of a head that RoPE rotates."""
        return int(self.d_head * self.rotary_fraction)

    @property
    def score_scale(self) -> float:
        """Factor of the products of queries and keys."""
        return self.d_head**-0.5 if self.attention_scale is None else self.attention_scale

    @property
    def attention_factor(self) -> float:
        """Factor of queries and keys with YaRN (Peng et al. 2023, equation 22)."""
        if self.rope_attention_factor is not None:
            return self.rope_attention_factor
        return 0.1 * math.log(self.rope_factor) + 1

    @property
    def windows(self) -> list[int | None]:
        """The window of each layer; None: a query sees all tokens before it."""
        return [None if layer in self.full_layers else self.window for layer in range(self.n_layers)]

    def at_layers(self, n_layers: int) -> Self:
        """Returns the model with fewer layers, the first ones."""
        layers = {key: [layer for layer in getattr(self, key) if layer < n_layers] for key in LAYER_LISTS}
        return replace(self, n_layers=n_layers, **layers)

    @property
    def is_gated(self) -> bool:
        """Whether the feed-forward network has a gate."""
        return self.ffn in GATED

    @property
    def has_qkv_bias(self) -> bool:
        """Whether queries, keys and values have biases."""
        return self.has_output_bias or self.qkv_bias

    @property
    def has_output_bias(self) -> bool:
        """Whether the output of attention has a bias."""
        return self.bias if self.attention_bias is None else self.attention_bias

    @property
    def has_ffn_bias(self) -> bool:
        """Whether the linear layers of the feed-forward network have biases."""
        return self.bias if self.ffn_bias is None else self.ffn_bias

    def __post_init__(self) -> None:
        for key in ("d_model", "n_layers", "n_heads", "d_ff", "max_seq_len", "vocab_size", "rope_original_len"):
            require(getattr(self, key) > 0, f"model.{key}", getattr(self, key), "a positive integer")
        require(self.vocab_size <= 2**31, "model.vocab_size", self.vocab_size, f"at most {2**31} (tokens are uint32)")
        self._check_heads()
        self._check_rope()
        self._check_layers()

        for key in ("norm_eps", "init_std", "embedding_scale", "residual_scale", "logit_divisor"):
            require(getattr(self, key) > 0, f"model.{key}", getattr(self, key), "a positive number")
        require(self.norm in ("layernorm", "rmsnorm"), "model.norm", self.norm, "layernorm or rmsnorm")
        require(self.ffn in (*UNGATED, *GATED), "model.ffn", self.ffn, ", ".join((*UNGATED, *GATED)))
        require(self.head in ("tokens", "scalar"), "model.head", self.head, "tokens or scalar")
        dtypes = (COMPUTE_DTYPE, WIDE_LOGITS)
        require(self.head_dtype in dtypes, "model.head_dtype", self.head_dtype, " or ".join(dtypes))
        require(self.norm_place in ("before", "after"), "model.norm_place", self.norm_place, "before or after")
        spans = ("head", "all") if self.qk_norm else ("head",)
        require(self.qk_norm_span in spans, "model.qk_norm_span", self.qk_norm_span, "head, or all with model.qk_norm")
        scale = self.attention_scale
        require(scale is None or scale > 0, "model.attention_scale", scale, "null or a positive number")
        require(self.logit_cap >= 0, "model.logit_cap", self.logit_cap, ">= 0 (0 is off)")
        require(self.export_as in (None, *EXPORTED), "model.export_as", self.export_as, f"null, {', '.join(EXPORTED)}")
        require(self.residual_init in ("depth", "zero"), "model.residual_init", self.residual_init, "depth or zero")

        base = self.base_width
        require(base is None or base > 0, "model.base_width", base, "null (no scaling) or a positive integer")
        untied = (
            "null with model.tie_embeddings=true: with width, the rate of a head falls and that of an embedding stays"
        )
        require(base is None or not self.tie_embeddings, "model.base_width", base, untied)

    def _check_heads(self) -> None:
        """Refuses heads that do not divide the model, key/value heads that do not divide them, and widths that RoPE
        cannot rotate in pairs.

        Raises:
            ConfigError: names the key and what would be accepted.
        """
        width = self.head_width
        require(width is None or (width > 0 and width % 2 == 0), "model.head_width", width, "null or an even number")
        if width is None and (self.d_model % self.n_heads or self.d_model // self.n_heads % 2):
            divisors = [n for n in range(1, math.isqrt(self.d_model) + 1) if self.d_model % n == 0]
            divisors = {n for divisor in divisors for n in (divisor, self.d_model // divisor)}
            divisors = {n for n in divisors if self.d_model // n % 2 == 0}
            nearest = sorted(divisors, key=lambda n: abs(n - self.n_heads))[:6]
            accepted = f"a divisor of model.d_model={self.d_model} with an even head width"
            if nearest:
                accepted += f", such as {sorted(nearest)}"
            require(False, "model.n_heads", self.n_heads, f"{accepted} (or set model.head_width)")
        divides = self.kv_heads > 0 and self.n_heads % self.kv_heads == 0
        require(divides, "model.n_kv_heads", self.n_kv_heads, f"a divisor of model.n_heads={self.n_heads}")

        require(
            0 < self.rotary_fraction <= 1 and self.rotary_width > 0 and self.rotary_width % 2 == 0,
            "model.rotary_fraction",
            self.rotary_fraction,
            f"a part of the head width {self.d_head} that is an even number, such as {2 / self.d_head:g} or 1",
        )

    def _check_layers(self) -> None:
        """Refuses a window without tokens, layers that the model lacks, and layers without a window that is not there.

        Raises:
            ConfigError: names the key and what would be accepted.
        """
        require(self.window is None or self.window > 0, "model.window", self.window, "null or a positive integer")
        for key in LAYER_LISTS:
            layers = getattr(self, key)
            accepted = f"different layers from 0 to {self.n_layers - 1}, ascending"
            fits = list(layers) == sorted({*layers}) and all(0 <= layer < self.n_layers for layer in layers)
            require(fits, f"model.{key}", layers, accepted)
        fits = self.window is not None or not self.full_layers
        require(fits, "model.full_layers", self.full_layers, "[] without model.window")

    def _check_rope(self) -> None:
        """Refuses an unknown scaling of RoPE, frequencies that are not positive, a factor without a scaling or below 1,
        and bounds in the wrong order.

        Raises:
            ConfigError: names the key and what would be accepted.
        """
        for key in ("rope_base", "rope_low_freq_factor"):
            require(getattr(self, key) > 0, f"model.{key}", getattr(self, key), "a positive number")
        scalings = ("none", "linear", "llama3", "yarn")
        require(self.rope_scaling in scalings, "model.rope_scaling", self.rope_scaling, ", ".join(scalings))
        accepted = "a number of at least 1"
        fits = self.rope_factor >= 1
        if self.rope_scaling == "none":
            accepted = "1 without model.rope_scaling"
            fits = self.rope_factor == 1
        require(fits, "model.rope_factor", self.rope_factor, accepted)
        low, high = self.rope_low_freq_factor, self.rope_high_freq_factor
        require(high > low, "model.rope_high_freq_factor", high, f"a number above model.rope_low_freq_factor={low}")

        slow, fast, attention_factor = self.rope_beta_slow, self.rope_beta_fast, self.rope_attention_factor
        require(slow > 0, "model.rope_beta_slow", slow, "a positive number")
        require(fast > slow, "model.rope_beta_fast", fast, f"a number above model.rope_beta_slow={slow}")
        fits = attention_factor is None or attention_factor > 0
        require(fits, "model.rope_attention_factor", attention_factor, "null or a positive number")
        fits = self.rope_scaling != "yarn" or self.rope_base > 1
        require(fits, "model.rope_base", self.rope_base, "a number above 1 with model.rope_scaling=yarn")


@dataclass
class AdaptedModelConfig(ModelConfig):
    """A model whose weights are those of a frozen base, with trained adapters beside some of them."""

    lora: LoraConfig = field(default_factory=LoraConfig)  # pyright: ignore[reportIncompatibleVariableOverride]
    base: str = ""  # directory of the base's checkpoint
    base_sha256: str = ""  # SHA-256 of the manifest of that checkpoint

    @classmethod
    def of(cls, model: ModelConfig, lora: LoraConfig, base: str = "", base_sha256: str = "") -> "AdaptedModelConfig":
        """Returns `model` with the adapters that `lora` describes."""
        return cls(**vars(model.plain), lora=lora, base=base, base_sha256=base_sha256)

    @property
    def plain(self) -> ModelConfig:
        return ModelConfig(**{field.name: getattr(self, field.name) for field in fields(ModelConfig)})

    @property
    def scale(self) -> float:
        """Factor of the product B A."""
        if self.lora.rslora:
            return self.lora.alpha / math.sqrt(self.lora.rank)
        return self.lora.alpha / self.lora.rank

    @property
    def is_in_4bit(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.lora.load_in_4bit

    def adapted(self, part: str) -> tuple[str, ...]:
        """Returns the names of the weights of `part` (attention | feed_forward) that have adapters."""
        targets = self.lora.targets
        # The part as a whole names all weights that the model has: not all have a gate.
        weights = [weight for weight in LORA_TARGETS[part] if weight != "gate" or self.is_gated]
        return tuple(w for w in LORA_TARGETS[part] if w in targets or (part in targets and w in weights))

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.lora.rank <= self.d_model, "stage.lora.rank", self.lora.rank, f"1 to {self.d_model} (d_model)")
        lacks_gate = "gate" in self.lora.targets and not self.is_gated
        require(not lacks_gate, "stage.lora.targets", "gate", f"others: model.ffn={self.ffn} has no gate")
