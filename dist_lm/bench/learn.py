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

import torch
import torch.distributed as dist
from rich.console import Console

from dist_lm.bench.case import write_records
from dist_lm.bench.learn_held_out import HeldOut, held_out_of, opening_of
from dist_lm.bench.learn_recipes import OwnLearner, Recipe, recipes_of
from dist_lm.bench.learn_report import Curve, Point, drawing, languages_of, records_of, table_of
from dist_lm.errors import ConfigError, UserError
from dist_lm.parallel.mesh import choose_device, leave_groups
from dist_lm.stages.text import open_stream

TURN = 5  # steps
WARM_UP, TIMED = 2, 6  # steps that find the speed of a learner, for a budget of seconds
MANY = 10**6  # steps of a learner that is only looked at
POINTS = 10  # of a curve
UNITS = ("tokens", "flops", "s")


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

    def steps(self, recipe: str, cost: float) -> int:
        """Optimizer steps that it pays for.

        Args:
            cost: of a step, in its unit.

        Raises:
            ConfigError: not even one; names the recipe.
        """
        if self.amount < cost:
            raise ConfigError(
                f"--budget={self.amount:g}{self.unit}: a step of {recipe} costs {cost:.3g}{self.unit}; expected at "
                "least as much"
            )
        return int(self.amount / cost)


def prepare(folder: Path, option: str, value: Path) -> None:
    """Make the folder that results go to, before anything is measured."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{option}={value}: {folder} cannot be made ({error.strerror}); choose another") from error


@contextmanager
def _names(recipe: str) -> Iterator[None]:
    """An error within names the recipe."""
    try:
        yield
    except UserError as error:
        raise type(error)(f"{recipe}: {error}") from error


class Lane:
    """A learner with its stream and its clock."""

    def __init__(self, recipe: Recipe, seed: int, steps: int, device: torch.device) -> None:
        self.config = replace(recipe.config, seed=seed)
        with _names(recipe.name):
            self.learner = recipe.build(self.config, steps, device)
            self.stream = open_stream(opening_of(self.config, device))
        self.device, self.done, self.seconds = device, 0, 0.0
        self.curve = Curve(recipe.name, seed, self.learner.parameters, steps)

    def train(self, steps: int) -> float:
        """Take some steps; returns their seconds, without the wait for data."""
        spent = 0.0
        for _ in range(steps):
            batches = [batch.to(self.device) for batch in next(self.stream).micro_batches]
            began = time.perf_counter()
            with _names(self.curve.recipe):
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


@contextmanager
def _lanes(
    recipes: Sequence[Recipe], seed: int, steps: Mapping[str, int], device: torch.device
) -> Iterator[list[Lane]]:
    """A lane of each recipe; `steps` by name."""
    with ExitStack() as stack:
        lanes = []
        for recipe in recipes:
            lanes.append(Lane(recipe, seed, steps[recipe.name], device))
            stack.callback(lanes[-1].stream.close)
        yield lanes


def steps_of(recipes: Sequence[Recipe], budget: Budget, device: torch.device) -> dict[str, int]:
    """Optimizer steps of each recipe that the budget pays for; their seconds are found in turns.

    Raises:
        ConfigError: it does not pay for one.
    """
    costs = {one.name: float(one.config.stage.global_batch * one.config.stage.seq_len) for one in recipes}
    if budget.unit != "tokens":
        with _lanes(recipes, recipes[0].config.seed, dict.fromkeys(costs, MANY), device) as lanes:
            for lane in lanes:
                costs[lane.curve.recipe] *= lane.learner.flops_per_token
            if budget.unit == "s":
                for lane in lanes:
                    lane.train(WARM_UP)
                seconds = [[lane.train(1) for lane in lanes] for _ in range(TIMED)]
                costs = dict(zip(costs, map(statistics.median, zip(*seconds, strict=True)), strict=True))
    return {name: budget.steps(name, cost) for name, cost in costs.items()}


def curves_of_a_seed(
    recipes: Sequence[Recipe],
    seed: int,
    steps: Mapping[str, int],
    measured_on: Mapping[str, HeldOut],
    device: torch.device,
    say: Callable[[str], None],
    points: int = POINTS,
    *,
    at_start: bool = True,
) -> list[Curve]:
    """Train every recipe, in turns; a curve has `points` points, and one before the first step.

    Args:
        steps, measured_on: of each recipe, by name.
    """
    with _lanes(recipes, seed, steps, device) as lanes:
        for lane in lanes:
            lane.curve.bytes_per_token = measured_on[lane.curve.recipe].bytes_per_token
            if at_start:
                lane.measure(measured_on[lane.curve.recipe])
        while behind := [lane for lane in lanes if lane.done < lane.curve.steps]:
            for lane in behind:
                last = lane.curve.steps
                due = -(-(lane.done + 1) * points // last) * last // points  # step of the next point
                lane.train(min(TURN, max(1, due - lane.done)))
                if lane.done >= due:
                    lane.measure(measured_on[lane.curve.recipe])
            say(f"seed {seed}: " + ", ".join(f"{lane.curve.recipe} {lane.done}/{lane.curve.steps}" for lane in lanes))
    return [lane.curve for lane in lanes]


@contextmanager
def alone() -> Iterator[None]:
    """A process group of this process, which an optimizer step sums over."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        leave_groups()


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
    with alone(), console.status("the speed of each recipe") as status:
        measured_on = held_out_of(compared, device)
        steps = steps_of(compared, spent, device)
        first = compared[0].config.seed
        for seed in range(first, first + seeds):
            curves += curves_of_a_seed(compared, seed, steps, measured_on, device, status.update, points)
            _write(curves, json_file, curves_in)  # a later seed may fail
    title = f"learn: {budget} each, {seeds} seed{'s' * (seeds > 1)}, on {compared[0].config.stage.corpus}"
    console.print(table_of(title, curves))
    if len({one.config.work_dir for one in compared}) > 1:
        console.print(languages_of(curves))
    return curves
