"""The plan of a command: which stages run and from which artefacts. It is computed before anything starts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dist_lm.config.root import Config
from dist_lm.errors import ConfigError, require
from dist_lm.stages.registry import stage_named
from dist_lm.stages.stage import Action, Place, Stage, run_of
from dist_lm.training import checkpoint_files

if TYPE_CHECKING:
    from dist_lm.prepare.layout_choice import Begun


@dataclass(frozen=True)
class PlannedStage:
    """One line of a plan."""

    stage: Stage
    config: Config
    action: Action
    detail: str
    begun: "Begun | None" = None  # of a training run that goes on
    is_target: bool = True  # whether the command names it

    @property
    def name(self) -> str:
        return self.stage.name

    @property
    def progress(self) -> str:
        """What the next command continues from, for messages."""
        return self.stage.progress(self.config)


@dataclass(frozen=True)
class Plan:
    """Stages in execution order; the last one is the target of the command."""

    stages: tuple[PlannedStage, ...]

    @property
    def target(self) -> PlannedStage:
        """The stage that the command names."""
        return self.stages[-1]

    @property
    def missing(self) -> tuple[PlannedStage, ...]:
        """The stages that this command builds or continues."""
        return tuple(stage for stage in self.stages if stage.action is not Action.READY)


def make_plan(target: str, compose: Callable[[str], Config]) -> Plan:
    """Inspect the work directory and plan `target` and every stage it needs.

    Args:
        compose: returns the configuration of a stage.

    Raises:
        ConfigError: a run exists with other settings, or a needed stage is missing with prerequisites=fail.
        ArtefactError: existing files were made with other settings.
    """
    composed = {target: compose(target)}
    starts_from = stage_named(target).starts_from
    # a given start makes the stage before unnecessary, for the stages on the way too
    own = composed[target].stage
    given = starts_from if starts_from and (own.init_from != "auto" or own.branch_from) else None

    def needs_of(name: str) -> Sequence[str]:
        if name not in composed:
            try:
                composed[name] = compose(name)
            except ConfigError as error:
                without = "; stage.init_from=none begins without it" if name == starts_from else ""
                raise ConfigError(f"stage {name}, which stage={target} needs: {error}{without}") from error
        return [need for need in stage_named(name).reads(composed[name]) if need != given]

    order = in_order(target, needs_of)
    configs = {name: composed[name] for name in order}
    for name in reversed(order[:-1]):
        readers = [config for other, config in configs.items() if name in stage_named(other).reads(config)]
        configs[name] = stage_named(name).for_readers(configs[name], readers)
    check_eval_pool(configs, target)
    rebuilt: set[str] = set()
    planned = []
    for name, config in configs.items():
        stage = stage_named(name)
        try:
            stage.check(config)
        except ValueError as error:
            raise error if isinstance(error, ConfigError) else ConfigError(f"stage={name}: {error}") from error
        is_target = name == target
        found = stage.look(config, is_target=is_target, rebuilt=rebuilt)
        if found.action is not Action.READY:
            rebuilt.add(name)
        planned.append(PlannedStage(stage, found.config, found.action, found.detail, is_target=is_target))
    missing = [one.name for one in planned[:-1] if one.action is not Action.READY]
    if missing and configs[target].prerequisites == "fail":
        commands = ", then ".join(f"`python -m dist_lm.launch stage={name}`" for name in missing)
        raise ConfigError(f"prerequisites=fail: stage={target} needs {', '.join(missing)} first: run {commands}")
    return Plan(tuple(planned))


def check_eval_pool(configs: Mapping[str, Config], target: str) -> None:
    """Refuse actors for tasks that no stage of the plan has.

    Raises:
        ConfigError: `target` trains, so it could have some.
    """
    actors = configs[target].eval.pool.actors
    asked = any(getattr(config.stage, "eval_tasks", None) for config in configs.values())
    trains = stage_named(target).place is Place.RANKS
    accepted = "0 without stage.eval_tasks: these actors answer its tasks and nothing else"
    require(asked or not trains or actors == 0, "eval.pool.actors", actors, accepted)


def untraced(stage: PlannedStage) -> str:
    """A warning if no step of `profile.steps` is left to be traced; else empty.

    Raises:
        ConfigError: the stage does not train.
    """
    steps = stage.config.profile.steps
    if not steps:
        return ""
    if stage.stage.place is not Place.RANKS:
        raise ConfigError(f"profile.steps={steps}: stage={stage.name} has no training steps: leave it out")
    newest = checkpoint_files.newest_step(run_of(stage.config).checkpoints)
    if stage.action is Action.READY:
        return f"profile.steps={steps}: no step is traced, the run is finished; choose another run_id"
    if steps[-1] <= newest:
        return f"profile.steps={steps}: no step is traced, the run continues after step {newest}"
    return ""


def in_order(target: str, needs_of: Callable[[str], Sequence[str]]) -> list[str]:
    """`target` and every stage it needs in topological order.

    Args:
        needs_of: returns the stages that a stage needs.
    """
    order: list[str] = []

    def visit(name: str) -> None:
        for need in needs_of(name):
            visit(need)
        if name not in order:
            order.append(name)

    visit(target)
    return order


def may_need(target: str) -> list[str]:
    """Every earlier stage that a command for `target` may build, in order."""
    return in_order(target, lambda name: stage_named(name).needs)[:-1]
