"""`dist-lm bench scaling`: what a configuration will learn, expected from runs of narrow models.

It is a model ladder (Bhagia et al. 2024), of bits per byte.

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
from dist_lm.bench.learn import ALONE, Budget, Recipe, alone, curves_of_a_seed, prepare, recipes_of
from dist_lm.bench.learn_held_out import corpus_of
from dist_lm.bench.scaling_law import Expected, ScalingLaw
from dist_lm.config.model import ModelConfig
from dist_lm.config.root import Config
from dist_lm.config.stage import StageConfig
from dist_lm.errors import ConfigError
from dist_lm.model.size import flops_per_token, is_matrix, parameter_shapes
from dist_lm.parallel.mesh import choose_device


@dataclass(frozen=True)
class Rung:
    """The ends of the runs of one width with one number of tokens."""

    width: int
    parameters: int  # of the matrices inside blocks
    tokens: int
    flops: float
    bits_per_byte: tuple[float, ...]  # of each seed

    @property
    def name(self) -> str:
        return f"{self.width} wide, {self.tokens} tokens"


def numbers_of(option: str, text: str) -> list[int]:
    """The positive whole numbers of `64,96,128` or `1e5,2e5`.

    Raises:
        ConfigError: it has fewer than three different ones, or something else.
    """
    accepted = "at least three different positive whole numbers, such as " + (
        "64,96,128" if option == "--widths" else "1e5,2e5,4e5"
    )
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"{option}={text}: expected {accepted}") from error
    if len({*found}) < 3 or not all(number > 0 and number.is_integer() for number in found):
        raise ConfigError(f"{option}={text}: expected {accepted}")
    return sorted({int(number) for number in found})


def narrowed(model: ModelConfig, width: int) -> list[str]:
    """The overrides that give a model another width.

    Raises:
        ConfigError: the width is no multiple of that of a head, or of a group of heads.
    """
    unit = model.d_head * (model.n_heads // model.kv_heads)
    if width % unit:
        raise ConfigError(
            f"--widths={width}: model.d_model={width}: expected a multiple of {unit}, as heads keep theirs"
        )
    heads = width // model.d_head
    words = {
        "d_model": width,
        "n_heads": heads,
        "d_ff": round(model.d_ff * width / model.d_model),
        "base_width": model.base_width or model.d_model,
    }
    if model.n_kv_heads is not None:
        words["n_kv_heads"] = heads * model.n_kv_heads // model.n_heads
    return [f"model.{key}={value}" for key, value in words.items()]


def shortened(stage: StageConfig, steps: int) -> StageConfig:
    """The stage with another number of steps, its schedule in proportion."""
    share = steps / stage.steps
    muon = replace(
        stage.muon,
        momentum_warmup_steps=int(share * stage.muon.momentum_warmup_steps),
        momentum_cooldown_steps=int(share * stage.muon.momentum_cooldown_steps),
    )
    return replace(
        stage,
        steps=steps,
        warmup_steps=int(share * stage.warmup_steps),
        decay_steps=int(share * stage.decay_steps),
        muon=muon,
    )


def _size_of(model: ModelConfig) -> int:
    """Parameters of the matrices inside blocks, which grow with width squared and depth."""
    return sum(math.prod(shape) for name, shape in parameter_shapes(model).items() if is_matrix(name))


def _climb(
    rungs: Sequence[Recipe], tokens: int, seeds: int, device: torch.device, say: Callable[[str], None]
) -> list[Rung]:
    """Train every width with one number of tokens."""
    stage = rungs[0].config.stage
    budget = Budget(tokens, "tokens")
    steps = budget.steps(stage, 1.0, 1.0)
    recipes = [replace(one, config=replace(one.config, stage=shortened(stage, steps))) for one in rungs]
    curves = []
    for seed in range(seeds):
        curves += curves_of_a_seed(
            recipes, seed, budget, device, lambda text: say(f"{tokens} tokens, {text}"), points=1, at_start=False
        )
    found = []
    for one in recipes:
        ends = [curve.end for curve in curves if curve.recipe == one.name]
        model = one.config.model
        bits = tuple(end.bits_per_byte for end in ends)
        found.append(Rung(model.d_model, _size_of(model), ends[0].tokens, ends[0].flops, bits))
    return found


def law_of(rungs: Sequence[Rung]) -> ScalingLaw:
    """The law of bits per byte; every seed of a rung is a run."""
    runs = [(rung.parameters, rung.tokens, bits) for rung in rungs for bits in rung.bits_per_byte]
    return ScalingLaw.fit(*zip(*runs, strict=True))


def run_scaling(
    overrides: Sequence[str],
    console: Console,
    *,
    widths: str,
    tokens: str,
    seeds: int,
    json_file: Path | None,
) -> list[Record]:
    """Train the rungs, print them, what the law of the others expected of the largest, and what it expects of the
    configured run; write records.

    Raises:
        ConfigError: see `numbers_of`, `narrowed`, and `learn.recipes_of`.
        UserError: the rungs do not determine a law.
        ArtefactError: the work directory lacks the corpus.
    """
    if seeds < 2:
        raise ConfigError(f"--seeds={seeds}: the interval holds the spread of seeds: expected at least 2")
    wide, long = numbers_of("--widths", widths), numbers_of("--tokens", tokens)
    defaults = (*ALONE, "stage.eval_sequences=0")  # all of val, as at the end of a run
    target = recipes_of(overrides, [], [], defaults)[0].config
    names = {f"{width} wide": " ".join(narrowed(target.model, width)) for width in wide}
    recipes = recipes_of(overrides, [f"{name}: {words}" for name, words in names.items()], [], defaults)[1:]
    if json_file:
        prepare(json_file.parent, "--json", json_file)
    device = choose_device(target.device, 0)
    rungs: list[Rung] = []
    with alone(), console.status("") as status:
        for each in long:
            rungs += _climb(recipes, each, seeds, device, status.update)
            if json_file:
                write_records(json_file, _records(rungs))
    console.print(_table(f"scaling: {seeds} seeds, on {target.stage.corpus}", rungs))
    largest = max(rungs, key=lambda rung: rung.flops)
    law = law_of(rungs)
    checked = law_of([rung for rung in rungs if rung is not largest]).expected(largest.parameters, largest.tokens)
    length = target.stage.steps * target.stage.global_batch * target.stage.seq_len
    expected = law.expected(_size_of(target.model), length)
    console.print(
        f"{largest.name}: measured {statistics.fmean(largest.bits_per_byte):.3f} bits per byte, expected "
        f"{_interval(checked)} by the other rungs"
    )
    times = length * flops_per_token(target.model, target.stage.seq_len) / largest.flops
    console.print(
        f"as configured ({target.model.d_model} wide, {length} tokens): expected {_interval(expected)} bits per byte, "
        f"with {times:.2g} times the FLOPs of the largest rung",
    )
    _note_repeats(target, length, console)
    ends = {"expected": expected.value, "expected, low": expected.low, "expected, high": expected.high}
    records = _records(rungs) + [_record(case, [value]) for case, value in ends.items()]
    if json_file:
        write_records(json_file, records)
    return records


def _interval(expected: Expected) -> str:
    return f"{expected.value:.3f} ({expected.low:.3f} to {expected.high:.3f})"


def _note_repeats(config: Config, tokens: int, console: Console) -> None:
    held = corpus_of(config, "train").n_tokens
    if tokens > held:
        console.print(
            f"note: {config.stage.corpus} has {held} tokens; the law does not know that a second epoch teaches less"
        )


def _table(title: str, rungs: Sequence[Rung]) -> Table:
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
    return Record(
        bench="scaling",
        case=case,
        value=statistics.fmean(bits),
        unit="bits/byte",
        peer=None,
        peer_value=None,
        ratio=None,
        ceiling=None,
        ceiling_fraction=None,
        rounds=len(bits),
        spread=spread(bits),
    )
