"""`dist-lm bench learn`: how much recipes learn from one stream within one budget, side by side.

    dist-lm bench learn stage=code model=nano --recipe "higher: stage.lr=0.06" --peer "neox: stage.lr=0.003"

All learners of a seed are in memory at once and train in turns, so a busy minute of the machine slows all alike. The
clock of a learner runs only during its own steps. Every learner reads the same corpus in the same order, and is
measured on the same held-out sequences.

Dimensions: B sequences, T tokens.
"""

import json
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from rich.console import Console

from dist_lm.bench.case import write_records
from dist_lm.bench.learn_held_out import HeldOut, corpus_of, held_out_of
from dist_lm.bench.learn_report import Curve, Point, drawing, languages_of, records_of, table_of
from dist_lm.config.root import Config
from dist_lm.config.stage import StageConfig
from dist_lm.data.batch import Batch
from dist_lm.data.stream import SequenceStream
from dist_lm.errors import ConfigError, UserError
from dist_lm.launcher.compose import compose_config
from dist_lm.model.keyed_random import DropoutKey, initialise
from dist_lm.model.size import flops_per_token
from dist_lm.model.transformer import Transformer
from dist_lm.parallel.mesh import choose_device
from dist_lm.stages.registry import stage_named
from dist_lm.stages.text import TextStage
from dist_lm.training.heartbeat import StopRequest
from dist_lm.training.objective import next_token
from dist_lm.training.optimizer import (
    build_optimizer,
    muon_momentum,
    set_learning_rate,
    set_momentum,
    stage_rate,
)
from dist_lm.training.step import accumulate_gradients, update

ALONE = ("tracking=none", "prerequisites=fail", "stage.init_from=none")
# no peer keeps attention inside a document; positions that start again belong to that mask
BASE = (*ALONE, "stage.document_mask=false", "stage.reset_positions=false")
TURN = 5  # steps
WARM_UP, TIMED = 2, 6  # steps that find the speed of a learner, for a budget of seconds
MANY = 10**6  # steps of a learner that is only looked at
POINTS = 10  # of a curve
UNITS = ("tokens", "flops", "s")


class Learner(Protocol):
    """A model in training."""

    @property
    def flops_per_token(self) -> float: ...

    @property
    def parameters(self) -> int: ...

    def step(self, number: int, micro_batches: Sequence[Batch]) -> None:
        """The optimizer step of this 0-based number."""
        ...

    def token_losses(self, batch: Batch) -> torch.Tensor:
        """Cross-entropy of every target, nats, (B, T)."""
        ...


@dataclass(frozen=True)
class Recipe:
    """One row of the table."""

    name: str
    config: Config
    build: Callable[[Config, int, torch.device], Learner]  # (config, its steps, device)


@dataclass(frozen=True)
class Budget:
    """What each learner may spend: training tokens, FLOPs, or seconds."""

    amount: float
    unit: str

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """`2e6tokens`, `1e14flops` or `60s`.

        Raises:
            ConfigError: `text` is none of these.
        """
        found = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?)\s*([a-z]+)", text)
        accepted = "a number and a unit, such as 2e6tokens, 1e14flops or 60s"
        if found is None or found[2] not in UNITS:
            raise ConfigError(f"--budget={text}: expected {accepted}")
        try:
            amount = float(found[1])
        except ValueError as error:
            raise ConfigError(f"--budget={text}: expected {accepted}") from error
        return cls(amount, found[2])

    def steps(self, stage: StageConfig, flops: float, step_s: float) -> int:
        """Optimizer steps that it pays for.

        Args:
            flops: per token.
            step_s: seconds of a step.
        """
        tokens = stage.global_batch * stage.seq_len
        cost = {"tokens": tokens, "flops": tokens * flops, "s": step_s}[self.unit]
        return max(1, int(self.amount / cost))


# --- what is compared ---


def recipes_of(
    overrides: Sequence[str], own: Sequence[str], peers: Sequence[str], defaults: Sequence[str] = BASE
) -> list[Recipe]:
    """The recipe of `overrides` alone, then `NAME: overrides` of each of `own`, then the peers.

    Args:
        defaults: overrides that come before `overrides`.

    Raises:
        ConfigError: a recipe without a name, an unknown peer, overrides that cannot be composed, a stage that does not
            learn the next token.
    """
    stage = [] if any(one.startswith("stage=") for one in overrides) else ["stage=code", "model=nano"]
    base = [*stage, *defaults, *overrides]
    found = [Recipe("as configured", compose_config(base), OwnLearner)]
    for text in own:
        name, rest = _named(text, "--recipe")
        found.append(Recipe(name, compose_config([*base, *rest]), OwnLearner))
    if peers:
        from dist_lm.bench.learn_peers import peer_recipe

        found += [peer_recipe(*_named(text, "--peer"), base) for text in peers]
    names = [one.name for one in found]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"--recipe={twice.pop()}: the name is taken; expected a name of its own")
    for one in found:
        if not isinstance(stage_named(one.config.stage.name), TextStage):
            raise ConfigError(
                f"{one.name}: stage={one.config.stage.name}: the loss of the next token is measured: expected "
                "a stage that trains on it, such as language or code"
            )
        if one.config.stage.ema_decay:
            raise ConfigError(f"{one.name}: stage.ema_decay is set; the weights are measured: expected 0")
    return found


def prepare(folder: Path, option: str, value: Path) -> None:
    """Make the folder that results go to, before anything is measured."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{option}={value}: {folder} cannot be made ({error.strerror}); choose another") from error


def _named(text: str, option: str) -> tuple[str, list[str]]:
    name, colon, rest = text.partition(":")
    if not name.strip() or not colon:
        raise ConfigError(f"{option}={text}: expected NAME: KEY=VALUE ...")
    return name.strip(), rest.split()


class OwnLearner:
    """Our model, optimizer and schedule, as a run has them."""

    def __init__(self, config: Config, steps: int, device: torch.device) -> None:
        if steps <= config.stage.warmup_steps:
            raise ConfigError(
                f"stage.warmup_steps={config.stage.warmup_steps}: the budget pays for {steps} steps; expected fewer "
                "steps of warm-up, or a larger --budget"
            )
        self.stage, self.seed = replace(config.stage, steps=steps), config.seed
        self.model = Transformer(config.model)
        initialise(self.model, config.seed)
        self.model.to(device)
        self.model.document_mask = config.stage.document_mask
        self.model.chunk_bytes = config.parallel.loss_chunk_mib << 20
        self.optimizer = build_optimizer(self.model, self.stage, self.stage.muon)
        self.objective = next_token(self.stage.label_smoothing, self.stage.z_loss)
        self.flops_per_token = float(flops_per_token(config.model, config.stage.seq_len))
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())

    def step(self, number: int, micro_batches: Sequence[Batch]) -> None:
        """See `Learner`."""
        set_learning_rate(self.optimizer, stage_rate(self.stage, number))
        set_momentum(self.optimizer, muon_momentum(self.stage, number))
        self.model.dropout = DropoutKey(self.stage.dropout, self.seed, number) if self.stage.dropout else None
        sums = accumulate_gradients(self.model, self.objective, micro_batches)
        self.model.dropout = None
        result = update(
            self.model, self.optimizer, sums, grad_clip=self.stage.grad_clip, counts=True, stop=StopRequest()
        )
        if not result.applied:
            raise UserError(f"step {number + 1}: the gradients are not finite; lower stage.lr={self.stage.lr}")

    def token_losses(self, batch: Batch) -> torch.Tensor:
        """See `Learner`."""
        return self.model.token_losses(batch)


def _stream(config: Config) -> SequenceStream:
    stage = config.stage
    return SequenceStream(
        corpus_of(config, "train"),
        seed=config.seed,
        seq_len=stage.seq_len,
        global_batch=stage.global_batch,
        micro_batch=stage.micro_batch,
        dp_rank=0,
        dp_size=1,
        document_mask=stage.document_mask,
        reset_positions=stage.reset_positions,
    )


class Lane:
    """A learner with its stream and its clock."""

    def __init__(self, recipe: Recipe, seed: int, steps: int, device: torch.device) -> None:
        self.config = replace(recipe.config, seed=seed)
        self.learner = recipe.build(self.config, steps, device)
        self.stream = _stream(self.config)
        self.device, self.done, self.seconds = device, 0, 0.0
        self.curve = Curve(recipe.name, seed, self.learner.parameters, steps)

    def train(self, steps: int) -> float:
        """Take some steps; returns their seconds, without the wait for data."""
        spent = 0.0
        for _ in range(steps):
            batches = [batch.to(self.device) for batch in next(self.stream).micro_batches]
            began = time.perf_counter()
            self.learner.step(self.done, batches)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            spent += time.perf_counter() - began
            self.done += 1
        self.seconds += spent
        return spent

    def measure(self, held_out: HeldOut) -> None:
        """Add a point to the curve."""
        tokens = self.done * self.config.stage.global_batch * self.config.stage.seq_len
        metrics = held_out.measure(self.learner)
        loss, bits = metrics["val/loss"], metrics["val/bits_per_byte"]
        prefix = "val/bits_per_byte_"
        self.curve.bits_by = {
            name.removeprefix(prefix): bits for name, bits in metrics.items() if name.startswith(prefix)
        }
        self.curve.points.append(Point(tokens, tokens * self.learner.flops_per_token, self.seconds, loss, bits))


def curves_of_a_seed(
    recipes: Sequence[Recipe],
    seed: int,
    budget: Budget,
    device: torch.device,
    say: Callable[[str], None],
    points: int = POINTS,
    *,
    at_start: bool = True,
) -> list[Curve]:
    """Train every recipe within the budget, in turns; a curve has `points` points, and one before the first step."""
    with ExitStack() as stack:

        def lanes_of(steps: Mapping[str, int]) -> list[Lane]:
            lanes = [Lane(recipe, seed, steps[recipe.name], device) for recipe in recipes]
            for lane in lanes:
                stack.callback(lane.stream.close)
            return lanes

        step_s = {recipe.name: 1.0 for recipe in recipes}
        if budget.unit == "s":
            say(f"seed {seed}: the speed of each recipe")
            for lane in lanes_of({recipe.name: MANY for recipe in recipes}):
                lane.train(WARM_UP)
                step_s[lane.curve.recipe] = statistics.median(lane.train(1) for _ in range(TIMED))
        flops = {one.name: flops_of(one, device) if budget.unit == "flops" else 1.0 for one in recipes}
        lanes = lanes_of(
            {one.name: budget.steps(one.config.stage, flops[one.name], step_s[one.name]) for one in recipes}
        )
        measured_on = held_out_of(recipes, device)
        for lane in lanes:
            lane.curve.bytes_per_token = measured_on[lane.curve.recipe].bytes_per_token
            if at_start:
                lane.measure(measured_on[lane.curve.recipe])
        while behind := [lane for lane in lanes if lane.done < lane.curve.steps]:
            for lane in behind:
                steps = lane.curve.steps
                due = -(-(lane.done + 1) * points // steps) * steps // points  # step of the next point
                lane.train(min(TURN, max(1, due - lane.done)))
                if lane.done >= due:
                    lane.measure(measured_on[lane.curve.recipe])
            say(f"seed {seed}: " + ", ".join(f"{lane.curve.recipe} {lane.done}/{lane.curve.steps}" for lane in lanes))
    return [lane.curve for lane in lanes]


def flops_of(recipe: Recipe, device: torch.device) -> float:
    """FLOPs a token of a recipe's model."""
    return recipe.build(recipe.config, MANY, device).flops_per_token


@contextmanager
def alone() -> Iterator[None]:
    """A process group of this process, which an optimizer step sums over."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _write(curves: Sequence[Curve], json_file: Path | None, curves_in: Path | None) -> None:
    if json_file:
        write_records(json_file, records_of(curves))
    if curves_in:
        lines = [
            {"recipe": curve.recipe, "seed": curve.seed, **asdict(point)} for curve in curves for point in curve.points
        ]
        (curves_in / "curves.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (curves_in / "curves.svg").write_text(drawing(curves))


def run_learning(
    overrides: Sequence[str],
    console: Console,
    *,
    recipes: Sequence[str],
    peers: Sequence[str],
    budget: str,
    seeds: int,
    json_file: Path | None,
    curves_in: Path | None,
    points: int = POINTS,
) -> list[Curve]:
    """Run the comparison, print its table, write records and curves.

    Args:
        recipes, peers: see `recipes_of`.
        budget: see `Budget.parse`.
        points: measurements of a recipe in training.
        curves_in: a folder that gets `curves.jsonl`, one point a line, and `curves.svg`.

    Raises:
        ConfigError: see `recipes_of` and `Budget.parse`; a folder of results cannot be made.
        ArtefactError: the work directory lacks the corpus.
    """
    spent = Budget.parse(budget)
    for option, value in (("seeds", seeds), ("points", points)):
        if value < 1:
            raise ConfigError(f"--{option}={value}: expected a positive integer")
    compared = recipes_of(overrides, recipes, peers)
    for one in compared[1:]:
        if one.build is OwnLearner and one.config == compared[0].config:
            console.print(f"note: {one.name} has the same configuration as the first row")
    if json_file:
        prepare(json_file.parent, "--json", json_file)
    if curves_in:
        prepare(curves_in, "--curves", curves_in)
    device = choose_device(compared[0].config.device, 0)
    curves: list[Curve] = []
    with alone(), console.status("") as status:
        for seed in range(seeds):
            curves += curves_of_a_seed(compared, seed, spent, device, status.update, points)
            _write(curves, json_file, curves_in)  # a later seed may fail
    title = f"learn: {budget} each, {seeds} seed{'s' * (seeds > 1)}, on {compared[0].config.stage.corpus}"
    console.print(table_of(title, curves))
    if len({one.config.work_dir for one in compared}) > 1:
        console.print(languages_of(curves))
    return curves
