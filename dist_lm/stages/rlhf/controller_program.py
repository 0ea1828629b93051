"""The program of the controller's process (`rlhf.controller=process`), and how the first rank starts it.

It joins the gang's Ray cluster in place of the first rank, reads the prompts again and opens the controller as that
rank would (`controller.py`).

    python -m dist_lm.stages.rlhf.controller_program SOCKET RUN_DIR DEVICE PARENT
"""

import logging
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import torch

import dist_lm
from dist_lm.cluster.events import PoolFailure
from dist_lm.cluster.pool import ActorsLostError
from dist_lm.cluster.ray_cluster import ClusterError
from dist_lm.errors import ArtefactError, ConfigError, UserError
from dist_lm.evaluation.in_loop import loop_tasks
from dist_lm.generation.decoder import WeightStream
from dist_lm.generation.request import RequestError
from dist_lm.rlhf.controller import Controller
from dist_lm.rlhf.controller_process import ControllerProcess, serve_controller
from dist_lm.rlhf.rules import RewardError
from dist_lm.stages.pool_start import pool_starter
from dist_lm.stages.registry import load_config
from dist_lm.stages.rlhf.config import RlhfRunConfig
from dist_lm.stages.rlhf.controller import open_controller, read_prompts
from dist_lm.storage.json_process import start_json_process
from dist_lm.storage.process import die_with_parent
from dist_lm.storage.run_directory import RunDirectory
from dist_lm.tokenizer.tokenizer import Tokenizer

PROGRAM = "dist_lm.stages.rlhf.controller_program"
# Errors that a rank tells apart; others reach it with their traceback.
ERRORS = (
    *(UserError, ArtefactError, ConfigError, RequestError, RewardError, ClusterError, ActorsLostError),
    PoolFailure,
)


def start_controller(
    run: RunDirectory, device: torch.device, weights: WeightStream, alive: Callable[[], None], staleness: int
) -> ControllerProcess:
    """Starts the controller of a run in a child of this process, the first rank, and returns it; to be closed.

    Args:
        weights: of any version of the policy; read to the end.
        alive: called regularly while this process waits for it.
        staleness: as in `ControllerProcess`.

    Raises:
        ClusterError, ArtefactError, ConfigError, UserError, PoolFailure: as `open_controller`, in the child.
        ControllerLostError: the child ends again and again.
    """
    # The child must import the same package as this process, wherever that was found.
    paths = (str(Path(dist_lm.__file__).parents[1]), os.environ.get("PYTHONPATH", ""))
    start = partial(
        start_json_process,
        *(PROGRAM, str(run.path), str(device), str(os.getpid())),
        environment=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)},
    )
    return ControllerProcess(start, weights, ERRORS, alive, staleness)


@contextmanager
def opened_controller(
    run: RunDirectory, device: torch.device, weights: WeightStream, alive: Callable[[], None]
) -> Iterator[Controller]:
    """Yields the controller of a run in this process, with its pool of actors; both end with the block.

    Raises:
        ClusterError, ArtefactError, ConfigError, UserError, PoolFailure: as `open_controller`.
        OSError: a file cannot be read.
    """
    config = load_config(run.config)
    assert isinstance(config, RlhfRunConfig)
    tokenizer = Tokenizer.load(run.work.tokenizer_model)
    prompts = read_prompts(config, run, tokenizer, judges=True)
    with ExitStack() as stack:
        pool = stack.enter_context(pool_starter(config, device))
        tasks = loop_tasks(config, run, tokenizer) if config.stage.eval_tasks else None
        controller = open_controller(config, run, tokenizer, device, prompts, weights, alive, stack, pool, tasks)
        # What draws beside the learner ends before the engines and environments that it uses.
        stack.callback(controller.end)
        yield controller


def main() -> None:
    """Serves the first rank.

    Raises:
        OSError: the kernel refuses to end this process with its parent.
    """
    # Standard error is the log of rank 0; what functions of a user print goes there, too.
    os.dup2(2, 1)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    descriptor, run_path, device, parent = sys.argv[1:]
    die_with_parent(int(parent))
    run = RunDirectory(Path(run_path))
    with socket.socket(fileno=int(descriptor)) as connection:
        serve_controller(connection, partial(opened_controller, run, torch.device(device)))


if __name__ == "__main__":
    main()
