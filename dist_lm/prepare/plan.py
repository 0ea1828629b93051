"""The plan of a command: the stages that run, and where they start from. It is made before anything starts."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from dist_lm.config.corpus import STAGE_RUN
from dist_lm.config.root import Config
from dist_lm.errors import ConfigError, did_you_mean, require
from dist_lm.parallel.layout import AXES
from dist_lm.prepare.command_file import command_file, overrides_in
from dist_lm.prepare.compose import compose_config, overrides_of, own_groups, target_stage
from dist_lm.prepare.conf_folders import choices, content_of
from dist_lm.stages.registry import load_config, stage_named, stage_names
from dist_lm.stages.stage import Action, RunsIn, Stage, run_of
from dist_lm.training import checkpoint_files

LENGTHS = ("steps", "epochs")  # keys of a stage that both say how long it trains
NAMED_START = re.compile(rf"(?:stage|stages\.\w+)\.init_from={STAGE_RUN}(\w+)$")


@dataclass(frozen=True)
class ContinuedRun:
    """A training run that the command continues."""

    recorded: Config  # the configuration that its ranks read last
    asked: frozenset[str]  # keys of `parallel` that the command sets


@dataclass(frozen=True)
class PlannedStage:
    """One line of a plan."""

    stage: Stage
    config: Config
    action: Action
    detail: str
    phases: tuple[tuple[str, ...], ...] = ()  # as in `Look`
    continued: ContinuedRun | None = None  # if it is a training run with a checkpoint
    is_target: bool = True  # whether the command names it

    @property
    def name(self) -> str:
        return self.stage.name

    @property
    def progress(self) -> str:
        """Names the state that the next command continues from, for messages."""
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


def plan_command(overrides: Sequence[str]) -> Plan:
    """Returns the plan of a command line (`key=value`, `group=choice`); nothing is written.

    Raises:
        ConfigError: the command line is wrong, a run exists with other settings, or a needed stage is missing with
            prerequisites=fail.
        ArtefactError: existing files were made with other settings or cannot be read.
        UserError: a package that is needed to read a model or tokenizer is not installed.
        OSError: a file cannot be read.
    """
    overrides = with_command_file(overrides)
    target = target_stage(overrides)
    check_stage_prefixes(overrides, target)
    plan = make_plan(target, lambda stage: compose_config(overrides_of(stage, target, overrides)))
    return with_continued_runs(plan, overrides)


def with_command_file(overrides: Sequence[str]) -> list[str]:
    """Returns `overrides` with `experiment=NAME` replaced by the command of that file (`command_file.py`), with
    `stage=` in front; unchanged without such a file.

    Keys of stages that the command does not run are left out: with `stage=sft`, those of a stage behind it.

    Raises:
        ConfigError: the file is no YAML or has a text that no override can have, or a folder of the user cannot be
            used.
        OSError: a file cannot be read.
    """
    names = [text.partition("=")[2] for text in overrides if text.startswith("experiment=")]
    if not names or names[-1] == "null":
        return list(overrides)
    # A mistyped name would be reported as a missing stage, which the file would have named.
    accepted = choices("experiment", overrides)
    hint = did_you_mean(names[-1], accepted, "experiment=")
    require(names[-1] in accepted, "experiment", names[-1], f"one of {', '.join(accepted)}{hint and f' ({hint})'}")
    file = command_file(names[-1], overrides)
    if file is None:
        return list(overrides)

    typed = [text for text in overrides if not text.startswith("experiment=")]
    chosen = [text.partition("=")[2] for text in typed if text.startswith("stage=")]
    target = [content_of(file)["stage"], *chosen][-1]
    from_file = overrides_in(file)
    if target in stage_names():
        from_file = _for_target(from_file, target)

    # A stage has one of steps and epochs: that of the command line.
    lengths = {text.partition("=")[0].rpartition(".") for text in typed}
    replaced = tuple(f"{stage}.{key}=" for stage, _, name in lengths if name in LENGTHS for key in LENGTHS)
    if replaced:
        from_file = [text for text in from_file if not text.startswith(replaced)]
    return [f"stage={target}", *from_file, *(text for text in typed if not text.startswith("stage="))]


def _for_target(overrides: Sequence[str], target: str) -> list[str]:
    """Returns the overrides of a command file that a command for `target` takes, in their order and in its words:
    `stages.TARGET.key` becomes `stage.key`, and keys of stages that do not run are left out.

    Raises:
        ConfigError: there is no stage `target`.
    """
    own_keys = own_groups(stage_named(target).schema)
    groups_of_others = {group for name in stage_names() for group in own_groups(stage_named(name).schema)} - {*own_keys}
    in_its_words = [text.replace(f"stages.{target}.", "stage.", 1) for text in overrides]
    run = may_run(target, in_its_words)

    taken_over = []
    for text in in_its_words:
        group, _, rest = text.partition("=")[0].partition(".")
        runs = group != "stages" or rest.partition(".")[0] in run
        if runs and group not in groups_of_others:
            taken_over.append(text)
    return taken_over


def make_plan(target: str, compose: Callable[[str], Config]) -> Plan:
    """Inspects the work directory and plans `target` and every stage it needs; writes nothing.

    Args:
        compose: returns the configuration of a stage, or raises ConfigError; called once for each stage.

    Raises:
        ConfigError: a configuration is invalid (the message names an earlier stage), a run exists with other settings,
            actors have no tasks, or a needed stage is missing with prerequisites=fail.
        ArtefactError: existing files were made with other settings or cannot be read. Other errors of `compose` pass.
    """
    composed = {target: compose(target)}
    starts_from = stage_named(target).starts_from

    # If init_from or branch_from names another start, the preceding stage is left out, also for the stages in between.
    settings = composed[target].stage
    unneeded = None
    other_start = settings.branch_from or stage_named(target).start_of(composed[target]) != starts_from
    if starts_from and other_start:
        unneeded = starts_from

    def needs_of(name: str) -> Sequence[str]:
        if name not in composed:
            try:
                composed[name] = compose(name)
            except ConfigError as error:
                without = "; stage.init_from=none begins without it" if name == starts_from else ""
                raise ConfigError(f"stage {name}, which stage={target} needs: {error}{without}") from error
        check_start(name, composed[name])
        return [need for need in stage_named(name).reads(composed[name]) if need != unneeded]

    order = in_order(target, needs_of)
    configs = {name: composed[name] for name in order}

    # From the last stage to the first: what a stage must make depends on the stages that read it.
    for name in reversed(order[:-1]):
        readers = [config for reader, config in configs.items() if name in stage_named(reader).reads(config)]
        configs[name] = stage_named(name).for_readers(configs[name], readers)
    check_eval_pool(configs, target)

    # A stage that cannot run is refused before any stage looks at its files and sources.
    for name, config in configs.items():
        try:
            stage_named(name).check(config)
        except ConfigError:
            raise
        except ValueError as error:
            raise ConfigError(f"stage={name}: {error}") from error

    rebuilt: set[str] = set()
    planned = []
    folders: dict[str, str] = {}
    for name, config in configs.items():
        stage = stage_named(name)
        is_target = name == target
        # A stage reads the folders that the stages before it build or find.
        config = replace(config, corpus=replace(config.corpus, folders={**config.corpus.folders, **folders}))
        look = stage.look(config, is_target=is_target, rebuilt=rebuilt)
        if look.action is not Action.READY:
            rebuilt.add(name)
        if stage.runs_in is RunsIn.LAUNCHER:
            folders |= look.config.corpus.folders
        planned.append(PlannedStage(stage, look.config, look.action, look.detail, look.phases, is_target=is_target))

    missing = [earlier.name for earlier in planned[:-1] if earlier.action is not Action.READY]
    if missing and configs[target].prerequisites == "fail":
        commands = ", then ".join(f"`python -m dist_lm.launch stage={name}`" for name in missing)
        raise ConfigError(f"prerequisites=fail: stage={target} needs {', '.join(missing)} first: run {commands}")
    return Plan(tuple(planned))


def with_continued_runs(plan: Plan, overrides: Sequence[str]) -> Plan:
    """Returns `plan` with the recorded configurations of the training runs that the command continues.

    Reads their config.yaml; `plan` is not changed.

    Raises:
        ConfigError: a recorded configuration is invalid.
    """
    # The recorded layout stays unless this command sets `parallel` keys; defaults of conf/ do not count.
    keys = [override.split("=")[0] for override in overrides]
    changed_keys = {key.removeprefix("parallel.") for key in keys if key.startswith("parallel.")}
    if "parallel" in keys:
        changed_keys |= set(AXES)

    def with_recorded(stage: PlannedStage) -> PlannedStage:
        if stage.stage.runs_in is not RunsIn.RANKS or stage.action is not Action.RESUME:
            return stage
        recorded = load_config(run_of(stage.config).config)
        return replace(stage, continued=ContinuedRun(recorded, frozenset(changed_keys)))

    return Plan(tuple(map(with_recorded, plan.stages)))


def check_stage_prefixes(overrides: Sequence[str], target: str) -> None:
    """Refuses `stages.NAME.KEY=value` unless NAME is a stage that the command may build on the way. KEY is not checked.

    Raises:
        ConfigError: names the override and the stages that are possible; or there is no stage `target`.
    """
    earlier = may_run(target, overrides)
    for override in overrides:
        if override.startswith("stages."):
            name = override.split(".")[1].split("=")[0]
            if name not in earlier or override.partition("=")[0].count(".") < 2:
                hint = "" if name in earlier else did_you_mean(name, earlier, "stages.")
                raise ConfigError(
                    f"{override}: {hint}expected stages.NAME.KEY=value with NAME one of "
                    f"{', '.join(earlier) or '(none)'}; keys of {target} itself are stage.KEY=value"
                )


def check_eval_pool(configs: Mapping[str, Config], target: str) -> None:
    """Refuses actors for tasks that no stage of the plan has; returns nothing.

    Raises:
        ConfigError: `target` trains, so it could have some.
    """
    # Idle actors would hold GPUs for the whole run.
    actors = configs[target].eval.pool.actors
    has_tasks = any(config.stage.eval_tasks for config in configs.values())
    trains = stage_named(target).runs_in is RunsIn.RANKS
    accepted = "0 without stage.eval_tasks: these actors answer its tasks and nothing else"
    require(has_tasks or not trains or actors == 0, "eval.pool.actors", actors, accepted)


def check_start(name: str, config: Config) -> None:
    """Refuses `stage.init_from=stage:NAME` unless NAME is a stage that trains and stands before this one in the order
    of the pipeline; returns nothing.

    Raises:
        ConfigError: names the stages that could be.
    """
    init_from = getattr(config.stage, "init_from", "")
    if not init_from.startswith(STAGE_RUN):
        return
    # Two stages that start from one another would have no order.
    names = stage_names()
    earlier = [stage for stage in names[: names.index(name)] if stage_named(stage).runs_in is RunsIn.RANKS]
    accepted = f"{STAGE_RUN}NAME with NAME a training stage before {name}: {', '.join(earlier) or 'none'}"
    require(init_from.removeprefix(STAGE_RUN) in earlier, "stage.init_from", init_from, accepted)


def untraced(stage: PlannedStage) -> str:
    """Returns a warning if no step of `profile.steps` is left to be traced; else an empty string.

    Raises:
        ConfigError: `profile.steps` is set and the stage does not train.
    """
    steps = stage.config.profile.steps
    if not steps:
        return ""
    if stage.stage.runs_in is not RunsIn.RANKS:
        raise ConfigError(f"profile.steps={steps}: stage={stage.name} has no training steps: leave it out")
    # A typing error in the steps would cost a whole run before it is noticed.
    newest = checkpoint_files.newest_step(run_of(stage.config).checkpoints)
    if stage.action is Action.READY:
        return f"profile.steps={steps}: no step is traced, the run is finished; choose another run_id"
    if steps[-1] <= newest:
        return f"profile.steps={steps}: no step is traced, the run continues after step {newest}"
    return ""


def in_order(target: str, needs_of: Callable[[str], Sequence[str]]) -> list[str]:
    """Returns `target` and every stage it needs, also indirectly, each once and after the stages that it needs itself:
    `target` is last.

    Args:
        needs_of: returns the stages that a stage needs, without a cycle; called more than once per stage.
    """
    order: list[str] = []

    def visit(name: str) -> None:
        for need in needs_of(name):
            visit(need)
        if name not in order:
            order.append(name)

    visit(target)
    return order


def may_run(target: str, overrides: Sequence[str]) -> list[str]:
    """Returns every earlier stage that the command `overrides` for `target` may build: those that stages may need, and
    those that `init_from=stage:NAME` names."""
    named_starts = [match[1] for override in overrides if (match := NAMED_START.match(override))]
    starts = [name for name in named_starts if name in stage_names()]
    return list(dict.fromkeys([*may_need(target), *(need for name in starts for need in (*may_need(name), name))]))


def may_need(target: str) -> list[str]:
    """Returns every earlier stage that a command for `target` may build, in order."""
    return in_order(target, lambda name: stage_named(name).needs)[:-1]
