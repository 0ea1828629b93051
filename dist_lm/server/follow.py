"""Follows a run: each new checkpoint is loaded, and the requests after it get its weights."""

import threading
from collections.abc import Callable
from pathlib import Path

from dist_lm.errors import UserError
from dist_lm.generation.load import load_model
from dist_lm.server.backend import Backend
from dist_lm.training import checkpoint_files as files

POLL_S = 2.0  # seconds between two looks at the run


class Follower:
    """A thread that looks at a run; `start` it, and `stop` it at the end.

    A checkpoint that cannot be loaded is reported once; the weights before it stay, and the next checkpoint is tried.
    """

    def __init__(
        self,
        run: Path,
        tokenizer: Path | None,
        checkpoint: Path,
        engine: Backend,
        report: Callable[[str], None],
        poll_s: float = POLL_S,
    ) -> None:
        """
        Args:
            run: a run, or a folder of checkpoints.
            tokenizer: as for `load_model`.
            checkpoint: the one that is served now.
            report: gets a line for each checkpoint, loaded or refused.
        """
        self._run = run
        self._tokenizer = tokenizer
        self._newest = checkpoint.resolve()
        self._engine = engine
        self._report = report
        self._poll_s = poll_s
        self._is_stopping = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="follower", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self, seconds: float) -> None:
        """Ends the thread; waits at most so many seconds for a checkpoint that is being read."""
        self._is_stopping.set()
        self._thread.join(seconds)

    def _follow(self) -> None:
        while not self._is_stopping.wait(self._poll_s):
            try:
                checkpoint = files.find_checkpoint(self._run).resolve()
            except UserError:
                continue  # the run is being written anew, or its disk is away: the weights stay
            if checkpoint != self._newest:
                # Noted before it is loaded: a damaged checkpoint is reported once, not at every look.
                self._newest = checkpoint
                self._load(checkpoint)

    def _load(self, checkpoint: Path) -> None:
        """Reads a checkpoint beside the requests under way, and gives it to the engine. Nothing is raised: that it is
        served, or why it is not, goes to `report`.
        """
        try:
            loaded = load_model(checkpoint, self._tokenizer)
        except (UserError, OSError) as error:  # also of a checkpoint that was deleted meanwhile
            self._report(f"{checkpoint.name} is not served: {error}")
            return

        def has_loaded(error: str) -> None:
            self._report(f"{checkpoint.name} is not served: {error}" if error else f"{checkpoint.name} is served now")

        self._engine.load_weights(loaded.weights, files.step_of(checkpoint), has_loaded)
