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
from dist_lm.bench.learn_held_out import HeldOut, arguments_of, held_out_of
from dist_lm.bench.learn_recipes import OwnLearner, recipes_of
from dist_lm.bench.learn_report import Curve, Point, drawing, languages_of, records_of, table_of
from dist_lm.bench.learner import Recipe
from dist_lm.bench.progress import progress
from dist_lm.errors import ConfigError, UserError
from dist_lm.parallel.guarded_gloo import guarded
from dist_lm.parallel.mesh import choose_device, leave_groups
from dist_lm.stages.text import open_stream

TURN = 5  # steps that a learner takes before the next one has its turn
WARM_UP, TIMED = 2, 6  # steps that measure the speed of a learner, for a budget of seconds
MANY = 10**6  # steps of the schedule of a learner that is only timed
POINTS = 10  # measurements of a curve
UNITS = ("tokens", "flops", "s")


@dataclass(frozen=True)
class Budget:
    """Limits what each learner may spend: training tokens, FLOPs, or seconds."""

    amount: float
    unit: str

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """Returns the budget that `text` says, such as `2e6tokens`, `1e14flops` or `60s`.

        Raises:
            ConfigError: `text` is no number with one of these units.
        """
        match = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?)\s*([a-z]+)", text)
        accepted = "a number and a unit, such as 2e6tokens, 1e14flops or 60s"
        if match is None or match[2] not in UNITS:
            raise ConfigError(f"--budget={text}: expected {accepted}")

        try:
            amount = float(match[1])
        except ValueError as error:
            # The pattern also matches 1.2.3.
            raise ConfigError(f"--budget={text}: expected {accepted}") from error
        return cls(amount, match[2])

    def steps(self, recipe: str, cost: float) -> int:
        """Returns the number of optimizer steps that the budget pays for.

        Args:
            cost: cost of a step, in the unit of the budget.

        Raises:
            ConfigError: the budget does not pay for one step; the message names the recipe.
        """
        if self.amount < cost:
            raise ConfigError(
                f"--budget={self.amount:g}{self.unit}: a step of {recipe} costs {cost:.3g}{self.unit}; expected at "
                "least as much"
            )
        return int(self.amount / cost)


def prepare(folder: Path, option: str, value: Path) -> None:
    """Makes the folder that results go to, before anything is measured; `option` and `value` are for the error.

    Raises:
        ConfigError: the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{option}={value}: {folder} cannot be made ({error.strerror}); choose another") from error


@contextmanager
def _names(recipe: str) -> Iterator[None]:
    """Puts the name of the recipe in front of the message of a user's error inside the block."""
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
            self.stream = open_stream(arguments_of(self.config, device))
        self.device = device
        self.steps_taken = 0
        self.seconds = 0.0  # spent in its own steps
        self.curve = Curve(recipe.name, seed, self.learner.parameters, steps)

    def train(self, steps: int) -> float:
        """Takes `steps` steps; returns their seconds, without the wait for data, and adds them to `seconds`.

        Raises:
            UserError: the learner's or the stream's; the learner's begins with the recipe.
        """
        spent = 0.0
        for _ in range(steps):
            batches = [batch.to(self.device) for batch in next(self.stream).micro_batches]
            began = time.perf_counter()
            with _names(self.curve.recipe):
                self.learner.step(self.steps_taken, batches)
            # CUDA runs asynchronously: without this the clock would stop before the step ends.
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            spent += time.perf_counter() - began
            self.steps_taken += 1

        self.seconds += spent
        return spent

    def measure(self, held_out: HeldOut) -> None:
        """Adds a point to the curve, measured now on the held-out sequences; its last bits by language replace earlier
        ones."""
        tokens = self.steps_taken * self.config.stage.global_batch * self.config.stage.seq_len
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
    """Yields a lane for each recipe, with new weights; their streams end with the block. `steps`: name of a recipe ->
    its steps.

    Raises:
        ConfigError, ArtefactError, UserError: a learner or its data cannot be opened.
    """
    with ExitStack() as stack:
        lanes = []
        for recipe in recipes:
            lanes.append(Lane(recipe, seed, steps[recipe.name], device))
            stack.callback(lanes[-1].stream.close)
        yield lanes


def steps_of(recipes: Sequence[Recipe], budget: Budget, device: torch.device) -> dict[str, int]:
    """Returns the optimizer steps of each recipe that the budget pays for, by name. For a budget of seconds it trains
    new learners for some steps and takes the median.

    Raises:
        ConfigError: the budget does not pay for one step of a recipe.
        ArtefactError, UserError: a learner or its data cannot be opened.
    """
    costs = {recipe.name: float(recipe.config.stage.global_batch * recipe.config.stage.seq_len) for recipe in recipes}

    # FLOPs and seconds need a learner; tokens of a step follow from the configuration.
    if budget.unit != "tokens":
        with _lanes(recipes, recipes[0].config.seed, dict.fromkeys(costs, MANY), device) as lanes:
            for lane in lanes:
                costs[lane.curve.recipe] *= lane.learner.flops_per_token

            # Seconds are measured in turns, so that a busy minute of the machine slows all recipes alike.
            if budget.unit == "s":
                # The first steps are slower and do not count.
                for lane in lanes:
                    lane.train(WARM_UP)
                rounds = [[lane.train(1) for lane in lanes] for _ in range(TIMED)]
                costs = dict(zip(costs, map(statistics.median, zip(*rounds, strict=True)), strict=True))

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
    """Trains every recipe with one seed, in turns, and returns their curves.

    Args:
        steps, measured_on: steps and held-out sequences of each recipe, by name.
        say: shows a line of progress.
        points: measurements of a curve during training.
        at_start: whether a curve also has a point before the first step.

    Raises:
        ConfigError, ArtefactError, UserError: a learner or its data cannot be opened, or a step fails; the message
            begins with the recipe.
    """
    with _lanes(recipes, seed, steps, device) as lanes:
        for lane in lanes:
            lane.curve.bytes_per_token = measured_on[lane.curve.recipe].bytes_per_token
            if at_start:
                lane.measure(measured_on[lane.curve.recipe])

        # Learners take turns of a few steps, so that a busy minute slows all of them alike.
        while unfinished := [lane for lane in lanes if lane.steps_taken < lane.curve.steps]:
            for lane in unfinished:
                last = lane.curve.steps
                # Step of the next point.
                next_point = -(-(lane.steps_taken + 1) * points // last) * last // points
                lane.train(min(TURN, max(1, next_point - lane.steps_taken)))
                if lane.steps_taken >= next_point:
                    lane.measure(measured_on[lane.curve.recipe])

            progress = (f"{lane.curve.recipe} {lane.steps_taken}/{lane.curve.steps}" for lane in lanes)
            say(f"seed {seed}: " + ", ".join(progress))
    return [lane.curve for lane in lanes]


@contextmanager
def alone() -> Iterator[None]:
    """Makes a process group of this process alone inside the block; an optimizer step sums over it.

    Raises:
        StrangerError: another user has connected to a port of this rank.
    """
    with guarded():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        leave_groups()


def _write(curves: Sequence[Curve], json_file: Path | None, curves_in: Path | None) -> None:
    """Writes all curves so far, in place of earlier files: records to `json_file`, points and drawing to the folder
    `curves_in`; None: not asked for.

    Raises:
        OSError: a file cannot be written.
    """
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
    """Runs the comparison, prints its table, writes records and curves, and returns the curves.

    Args:
        recipes, peers: see `recipes_of`.
        budget: see `Budget.parse`.
        points: measurements of a recipe in training.
        seeds: trainings of each recipe, from the configured seed on.
        json_file: a file for the records, as JSON lines, written anew after each seed; its folder is made.
        curves_in: a folder that gets `curves.jsonl`, one point a line, and `curves.svg`.

    Raises:
        ConfigError: see `recipes_of`, `Budget` and `held_out_of`; seeds or points below 1; a folder of results cannot
            be made.
        ArtefactError: the work directory lacks the corpus or the tokenizer, or one is damaged.
        UserError: as `compose_config`, a tokenizer lacks a mark that stage.fim_rate needs, or the gradients of our
            learner are not finite.
        OSError: a file cannot be written.
        StrangerError: another user has connected to a port of this process.
    """
    # Mistakes of the command line are found before any model is built.
    parsed_budget = Budget.parse(budget)
    for option, value in (("seeds", seeds), ("points", points)):
        if value < 1:
            raise ConfigError(f"--{option}={value}: expected a positive integer")

    compared = recipes_of(overrides, recipes, peers)
    for recipe in compared[1:]:
        if recipe.build is OwnLearner and recipe.config == compared[0].config:
            console.print(f"note: {recipe.name} has the same configuration as the first row")

    # A folder that cannot be made must fail before training, not after it.
    if json_file:
        prepare(json_file.parent, "--json", json_file)
    if curves_in:
        prepare(curves_in, "--curves", curves_in)

    device = choose_device(compared[0].config.device, 0)
    curves: list[Curve] = []
    with alone(), progress(console) as say:
        say("the speed of each recipe")
        measured_on = held_out_of(compared, device)
        steps = steps_of(compared, parsed_budget, device)
        first_seed = compared[0].config.seed
        for seed in range(first_seed, first_seed + seeds):
            curves += curves_of_a_seed(compared, seed, steps, measured_on, device, say, points)
            # After each seed, since a later one may fail.
            _write(curves, json_file, curves_in)

    title = f"learn: {budget} each, {seeds} seed{'s' * (seeds > 1)}, on {compared[0].config.stage.corpus}"
    console.print(table_of(title, curves))
    # Recipes with other work directories may have other tokenizers, which losses by token hide.
    if len({recipe.config.work_dir for recipe in compared}) > 1:
        console.print(languages_of(curves))
    return curves
