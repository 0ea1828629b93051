"""`dist-lm bench scaling` predicts from runs of narrow models what a configuration will learn.

It is a model ladder (Bhagia et al. 2024) of bits per byte.

    dist-lm bench scaling stage=code model=nano --widths 64,96,128 --tokens 1e5,2e5,4e5 --seeds 2

A rung is the configured model at another width and with another number of tokens: heads keep their width, `d_ff` its
ratio to `d_model`, `model.base_width` carries the rates (without one: from the configured width), and the schedule is
shortened. A scaling law is fitted to the ends of the rungs.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from dist_lm.bench.case import Record, spread, write_records
from dist_lm.bench.learn import alone, curves_of_a_seed, prepare
from dist_lm.bench.learn_held_out import corpus_of, held_out_of
from dist_lm.bench.learn_recipes import ALONE, recipes_of
from dist_lm.bench.learner import Recipe
from dist_lm.bench.progress import progress
from dist_lm.bench.scaling_law import Expected, ScalingLaw
from dist_lm.config.model import ModelConfig
from dist_lm.config.root import Config
from dist_lm.config.stage import StageConfig
from dist_lm.errors import ConfigError, UserError
from dist_lm.model.size import flops_per_token, is_matrix, parameter_shapes
from dist_lm.parallel.mesh import choose_device

FEW = 0.02  # largest share of bootstrap samples without a law that needs no note


@dataclass(frozen=True)
class Rung:
    """The runs of one width with one number of tokens, at their end."""

    width: int
    parameters: int  # parameters of the matrices inside blocks
    tokens: int
    flops: float
    bits_per_byte: tuple[float, ...]  # a value for each seed

    @property
    def name(self) -> str:
        return f"{self.width} wide, {self.tokens} tokens"


def numbers_of(option: str, text: str) -> list[int]:
    """Returns the positive whole numbers in `text`, such as `64,96,128` or `1e5,2e5,4e5`, sorted, each once. `option`
    names them in the error.

    Raises:
        ConfigError: `text` has fewer than three different numbers, or no numbers.
    """
    example = "64,96,128" if option == "--widths" else "1e5,2e5,4e5"
    accepted = f"at least three different positive whole numbers, such as {example}"
    try:
        numbers = {float(part) for part in text.split(",")}
    except ValueError as error:
        raise ConfigError(f"{option}={text}: expected {accepted}") from error

    # A line fits any two points, so a trend takes three.
    if len(numbers) < 3 or not all(number > 0 and number.is_integer() for number in numbers):
        raise ConfigError(f"{option}={text}: expected {accepted}")
    return sorted(int(number) for number in numbers)


def narrowed(model: ModelConfig, width: int) -> list[str]:
    """Returns the overrides that give a model another width: of heads, d_ff and base_width, too.

    Raises:
        ConfigError: the width has no whole number of heads or groups of heads, or the embeddings are tied.
    """
    if model.tie_embeddings:
        raise ConfigError(
            "model.tie_embeddings=true: bench scaling needs model.tie_embeddings=false, as model.base_width does"
        )

    # Heads keep their width and groups of heads their size, so a width holds whole groups.
    unit = model.d_model // math.gcd(model.d_model, model.kv_heads)
    if width % unit:
        raise ConfigError(
            f"--widths={width}: model.d_model={width}: expected a multiple of {unit}, as heads keep "
            "their width and groups of heads their size"
        )

    shape = {
        "d_model": width,
        "n_heads": model.n_heads * width // model.d_model,
        "d_ff": round(model.d_ff * width / model.d_model),
        "base_width": model.base_width or model.d_model,
    }
    if model.n_kv_heads is not None:
        shape["n_kv_heads"] = model.n_kv_heads * width // model.d_model
    return [f"model.{key}={size}" for key, size in shape.items()]


def shortened(stage: StageConfig, steps: int) -> StageConfig:
    """Returns the stage with another number of steps, warm-ups, decay and cool-down in proportion (rounded)."""
    share = steps / stage.steps
    warmup = round(share * stage.warmup_steps)
    muon = replace(
        stage.muon,
        momentum_warmup_steps=round(share * stage.muon.momentum_warmup_steps),
        momentum_cooldown_steps=round(share * stage.muon.momentum_cooldown_steps),
    )
    # The decay must not begin before the warm-up has ended.
    decay = min(round(share * stage.decay_steps), max(0, steps - warmup))
    return replace(stage, steps=steps, warmup_steps=warmup, decay_steps=decay, muon=muon)


def _size_of(model: ModelConfig) -> int:
    """Counts the parameters of the matrices inside blocks, which grow with width squared and with depth."""
    return sum(math.prod(shape) for name, shape in parameter_shapes(model).items() if is_matrix(name))


def _climb(
    rungs: Sequence[Recipe], steps: int, seeds: int, device: torch.device, say: Callable[[str], None]
) -> list[Rung]:
    """Trains every width for one number of steps, with `seeds` seeds from the configured one on; returns a rung for
    each width. `say` shows a line of progress.

    Raises:
        ConfigError, ArtefactError, UserError: as `held_out_of` and `curves_of_a_seed`.
    """
    recipes = [replace(rung, config=replace(rung.config, stage=shortened(rung.config.stage, steps))) for rung in rungs]
    steps_by_name = {recipe.name: steps for recipe in recipes}
    measured_on = held_out_of(recipes, device)

    def say_steps(text: str) -> None:
        say(f"{steps} steps, {text}")

    curves = []
    first_seed = recipes[0].config.seed
    for seed in range(first_seed, first_seed + seeds):
        curves += curves_of_a_seed(
            recipes, seed, steps_by_name, measured_on, device, say_steps, points=1, at_start=False
        )

    # Runs that differ in their seed alone make one rung.
    trained = []
    for recipe in recipes:
        ends = [curve.end for curve in curves if curve.recipe == recipe.name]
        model = recipe.config.model
        bits = tuple(end.bits_per_byte for end in ends)
        trained.append(Rung(model.d_model, _size_of(model), ends[0].tokens, ends[0].flops, bits))
    return trained


def steps_of(stage: StageConfig, tokens: Sequence[int]) -> list[int]:
    """Returns the optimizer steps that numbers of tokens make (rounded down), sorted, each once.

    Raises:
        ConfigError: there are fewer than three different numbers of steps, or a number of tokens makes no step.
    """
    tokens_a_step = stage.global_batch * stage.seq_len
    steps = sorted({count // tokens_a_step for count in tokens})
    if steps[0] == 0 or len(steps) < 3:
        raise ConfigError(
            f"--tokens={','.join(map(str, tokens))}: a step has {tokens_a_step} tokens "
            "(stage.global_batch x stage.seq_len): expected at least that, and at least three different numbers of "
            f"steps, such as {tokens_a_step},{2 * tokens_a_step},{4 * tokens_a_step}"
        )
    return steps


def law_of(rungs: Sequence[Rung]) -> ScalingLaw:
    """Fits the law of bits per byte to rungs.

    Raises:
        UserError: the rungs do not determine a law.
    """
    return ScalingLaw.fit(
        [rung.parameters for rung in rungs], [rung.tokens for rung in rungs], [rung.bits_per_byte for rung in rungs]
    )


def run_scaling(
    overrides: Sequence[str],
    console: Console,
    *,
    widths: str,
    tokens: str,
    seeds: int,
    json_file: Path | None,
) -> list[Record]:
    """Trains models of several widths and predicts the held-out loss of the configured run, in bits per byte.

    A rung is one width with one number of tokens, trained with several seeds. The function prints the rungs and the
    value that a scaling law fitted to them expects of the configured run. As a check it also prints what the law of the
    other rungs expects of the largest rung.

    Args:
        widths, tokens: numbers with commas, see `numbers_of`: values of model.d_model, and training tokens of a run.
        seeds: runs of each rung; at least 2.
        json_file: gets the records as JSON lines. It is rewritten after each number of steps, so that a later failure
            keeps the finished rungs; its folder is made. None: no file.

    Returns:
        A record for each rung (mean over its seeds), then three for the configured run: the expected value, the lower
        and the upper end of its interval. All values are bits per byte.

    Raises:
        ConfigError: see `numbers_of`, `steps_of`, `narrowed`, and `learn_recipes.recipes_of`; fewer than two seeds.
        UserError: the rungs do not determine a law, or the gradients of a run are not finite.
        ArtefactError: the work directory lacks the corpus or the tokenizer, or one is damaged.
        StrangerError: another user has connected to a port of this process.
    """
    if seeds < 2:
        raise ConfigError(f"--seeds={seeds}: the interval holds the spread of seeds: expected at least 2")
    chosen_widths = numbers_of("--widths", widths)
    chosen_tokens = numbers_of("--tokens", tokens)

    # All of val, as at the end of a run.
    defaults = (*ALONE, "stage.eval_sequences=0")
    target = recipes_of(overrides, [], [], defaults)[0].config
    rung_texts = [f"{width} wide: {' '.join(narrowed(target.model, width))}" for width in chosen_widths]
    step_counts = steps_of(target.stage, chosen_tokens)
    # The first recipe is the configured run itself, which is the target and no rung.
    recipes = recipes_of(overrides, rung_texts, [], defaults)[1:]
    if json_file:
        prepare(json_file.parent, "--json", json_file)

    device = choose_device(target.device, 0)
    rungs: list[Rung] = []
    with alone(), progress(console) as say:
        for steps in step_counts:
            rungs += _climb(recipes, steps, seeds, device, say)
            if json_file:
                # A later rung may fail.
                write_records(json_file, _records(rungs))
    console.print(_table(f"scaling: {seeds} seeds, on {target.stage.corpus}", rungs))

    target_tokens = target.stage.steps * target.stage.global_batch * target.stage.seq_len
    expected = law_of(rungs).expected(_size_of(target.model), target_tokens)
    ends = {"expected": expected.value, "expected, low": expected.low, "expected, high": expected.high}
    records = _records(rungs) + [_record(case, [bits]) for case, bits in ends.items()]
    if json_file:
        write_records(json_file, records)

    largest = max(rungs, key=lambda rung: rung.flops)
    flops_ratio = target_tokens * flops_per_token(target.model, target.stage.seq_len) / largest.flops
    console.print(
        f"as configured ({target.model.d_model} wide, {target_tokens} tokens): expected {_interval(expected)}, with "
        f"{flops_ratio:.2g} times the FLOPs of the largest rung",
    )

    # The law of the smaller rungs must predict the largest one, or it will not predict the target either.
    measured = f"{largest.name}: measured {statistics.fmean(largest.bits_per_byte):.3f} bits per byte"
    try:
        smaller_law = law_of([rung for rung in rungs if rung is not largest])
        console.print(
            f"{measured}, expected {_interval(smaller_law.expected(largest.parameters, largest.tokens))} by the others"
        )
    except UserError as error:
        console.print(f"{measured}; the others expect nothing: {error}")

    _note_repeats(target, max(target_tokens, largest.tokens), console)
    return records


def _interval(expected: Expected) -> str:
    text = f"{expected.value:.3f} ({expected.low:.3f} to {expected.high:.3f}) bits per byte"
    if expected.without_law > FEW:
        text += f" (note: {expected.without_law:.0%} of the resampled rungs determine no law and are left out)"
    return text


def _note_repeats(config: Config, tokens: int, console: Console) -> None:
    """Prints which corpora a run of `tokens` tokens reads more than once, which the law knows nothing of.

    Raises:
        ArtefactError: a corpus is missing or damaged.
    """
    mix = config.stage.mix or {}
    for name, share in {config.stage.corpus: 1 - sum(mix.values()), **mix}.items():
        corpus_tokens = corpus_of(config, name, "train").n_tokens
        if share * tokens > corpus_tokens:
            console.print(
                f"note: {name} has {corpus_tokens} tokens; the law does not know that a second epoch teaches less"
            )


def _table(title: str, rungs: Sequence[Rung]) -> Table:
    """Returns a table with a row for each rung: width, parameters, tokens, FLOPs, bits per byte as the mean over the
    seeds, and largest minus smallest of them."""
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    for column in ("width", "M params in blocks", "M tokens", "FLOPs", "bits/byte", "range"):
        table.add_column(column, justify="right")

    for rung in rungs:
        bits = rung.bits_per_byte
        table.add_row(
            str(rung.width),
            f"{rung.parameters / 1e6:.2f}",
            f"{rung.tokens / 1e6:.2f}",
            f"{rung.flops:.1e}",
            f"{statistics.fmean(bits):.3f}",
            f"{max(bits) - min(bits):.3f}",
        )
    return table


def _records(rungs: Sequence[Rung]) -> list[Record]:
    return [_record(rung.name, rung.bits_per_byte) for rung in rungs]


def _record(case: str, bits: Sequence[float]) -> Record:
    """Returns the record of a case: the mean of its bits per byte, a value for each seed, and their spread."""
    return Record(
        bench="scaling",
        case=case,
        value=statistics.fmean(bits),
        unit="bits/byte",
        rounds=len(bits),
        spread=spread(bits),
    )
