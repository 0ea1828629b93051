"""The list of checks, and the choice of those that a command runs. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass

from dist_lm.errors import ConfigError

WITHIN_S = 600  # seconds for all checks of one card together
REHEARSAL_S = 300.0  # seconds for each check of a rehearsal; a full rehearsal takes three minutes


@dataclass(frozen=True)
class Check:
    """One check and its limits."""

    name: str  # the name for `--only`
    shows: str  # its subject, for the table
    target: str  # package.module:function
    budget_s: float  # the check fails if it takes longer
    # one: a process group of one rank; all: one of all GPUs, under torchrun; launcher: it starts the launcher itself
    runs: str = "one"
    several: bool = False  # needs more than one GPU


def _check(name: str, module: str, budget_s: float, shows: str, runs: str = "one", several: bool = False) -> Check:
    return Check(name, shows, f"dist_lm.gpu_check.{module}:{name}", budget_s, runs, several or runs == "all")


CHECKS = (
    _check("varlen", "arithmetic", 25, "packed attention in bf16, forward and backward, against fp32 on the CPU"),
    _check("masks", "arithmetic", 25, "attention with causal, document and branch masks, against the CPU"),
    _check("bits", "arithmetic", 30, "dropout masks and sampling draws equal those of the CPU, also when compiled"),
    _check("compiled", "arithmetic", 65, "steps in bf16, compiled and eager, against fp32; recompilations"),
    _check("engine", "engine", 65, "pages, CUDA graphs and new weights against a plain forward pass; speed"),
    _check("push", "pushing", 40, "new weights to another process by CUDA IPC, to another GPU by NCCL; a kill"),
    _check("large", "training", 130, "`large`: speed and memory, eager and compiled, beside the dry run; a profile"),
    _check("optimizers", "training", 50, "AdamW and Muon at `large`: the loss falls; time of an update"),
    _check("save", "training", 40, "asynchronous save: its pause; equal tensors when loaded, equal losses after it"),
    _check("smoke", "launched", 130, "all stages up to `rlhf`, through the launcher", runs="launcher"),
    _check("nccl", "several", 40, "sums of collectives; bandwidth of an all-reduce", runs="all"),
    _check("fsdp", "several", 120, "FSDP: the same losses as on one GPU; speed and memory at `large`", runs="all"),
    _check(
        "tp",
        "several",
        120,
        "tensor parallelism, also with `parallel.sp`: the same losses; speed and memory",
        runs="all",
    ),
    _check("cp", "several", 60, "sequences split over cards: the same losses; speed and memory", runs="all"),
    _check("kill", "launched", 150, "a rank is killed with SIGKILL: the run continues", runs="launcher", several=True),
    _check(
        "hang",
        "launched",
        180,
        "a rank is stopped: the launcher notices it, and the run continues",
        runs="launcher",
        several=True,
    ),
)


def chosen(only: Sequence[str], gpus: int) -> list[Check]:
    """Returns the checks that `--only` names, or without names all that `gpus` GPUs can run, in the order of CHECKS.

    Raises:
        ConfigError: a name is unknown, or its check needs more GPUs.
    """
    # All names are checked before the first check runs.
    check_of = {check.name: check for check in CHECKS}
    for name in only:
        if name not in check_of:
            raise ConfigError(f"--only={name}: expected one of {', '.join(check_of)}")
        if check_of[name].several and gpus < 2:
            raise ConfigError(f"--only={name}: this check needs --gpus=2 or more")

    if only:
        return [check for check in CHECKS if check.name in only]
    return [check for check in CHECKS if gpus > 1 or not check.several]


def named(name: str) -> Check:
    """Returns the check with this name."""
    return next(check for check in CHECKS if check.name == name)
