"""The tools of a check, and the program of one check: `python -m dist_lm.gpu_check.probe NAME FOLDER RANKS MODE`.

The program writes FOLDER/facts.json after every fact, and FOLDER/failure.txt, one line, if the check fails. With
several ranks it runs in each of them; the first to fail writes the reason.
"""

import json
import os
import pkgutil
import sys
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from dist_lm.config.root import Config
from dist_lm.errors import UserError
from dist_lm.gpu_check.checks import Check, named
from dist_lm.prepare.compose import compose_config
from dist_lm.storage import durable
from dist_lm.storage.process import die_with_parent

if TYPE_CHECKING:
    from dist_lm.parallel.mesh import World

Size = TypeVar("Size")

CARD, REHEARSAL = "card", "rehearsal"
MARK = "DIST_LM_GPU_CHECK"  # environment variable by which the processes of a check are found
FACTS, FAILURE = "facts.json", "failure.txt"
LONGEST_REASON = 300  # most characters of a failure's reason
COLLECTIVE_S = 60.0  # longest time of a collective


class CheckFailedError(UserError):
    """A check failed; the message says what is wrong."""


def expect(holds: bool, otherwise: str) -> None:
    """Fails the check unless `holds`.

    Raises:
        CheckFailedError: `holds` is false; the message is `otherwise`.
    """
    if not holds:
        raise CheckFailedError(otherwise)


@dataclass
class Probe:
    """Device, sizes and files of one check."""

    folder: Path  # folder for files of the check
    ranks: int  # GPUs that the check may use
    rehearsal: bool  # whether it runs on a CPU, at tiny sizes
    process_group: "World | None" = None  # the ranks; None for a check without a process group
    facts: dict[str, float] = field(default_factory=dict)

    @property
    def device_type(self) -> str:
        """Returns `cpu` for a rehearsal, else `cuda`."""
        return self.sized("cuda", rehearsal="cpu")

    def sized(self, card: Size, rehearsal: Size) -> Size:
        """Returns the size (or sizes, or settings) of this check: those for a card, or the tiny ones of a rehearsal."""
        return rehearsal if self.rehearsal else card

    @property
    def world(self) -> "World":
        """Returns the ranks of the check."""
        assert self.process_group, "this check has no process group"
        return self.process_group

    def note(self, name: str, value: float) -> None:
        """Records a figure, whose unit is the last word of its name."""
        self.facts[name] = float(f"{value:.5g}")
        if self.process_group is None or self.process_group.is_first:
            durable.write_text(self.folder / FACTS, json.dumps(self.facts))

    def config(self, *overrides: str, tiny: tuple[str, ...] = ()) -> Config:
        """Returns the configuration of stage `language` on the device of the check, or of the stage that an override
        names.

        Args:
            tiny: added in a rehearsal.
            overrides: added to those of every check.

        Raises:
            ConfigError: an override is no key, or its value does not fit.
        """
        common = ("stage=language", "tracking=none", f"device={self.device_type}", *overrides)
        return compose_config([*common, *self.sized((), rehearsal=tiny)])


def run(check: Check, probe: Probe) -> None:
    """Runs one check in this process, in a process group of its ranks unless it starts the launcher. Returns nothing if
    it passed.

    Raises:
        CheckFailedError: the check failed. Any other error of the check means the same.
        StrangerError: another user has connected to a port of this rank.
    """
    function = pkgutil.resolve_name(check.target)
    if check.runs == "launcher":
        function(probe)
        return

    # A check that starts the launcher needs no torch itself.
    import torch

    from dist_lm.parallel.mesh import process_group

    # Dynamo traces in a rehearsal, too, but Inductor and g++ would take minutes.
    if probe.rehearsal:
        torch.compiler.set_stance("default", force_backend="eager")

    with process_group(probe.device_type, COLLECTIVE_S) as probe.process_group:
        function(probe)


def reason_of(error: BaseException) -> str:
    """Returns the first line of an error; an error that no `expect` raised starts with its type."""
    first_line = next((line for line in str(error).splitlines() if line.strip()), "")
    if isinstance(error, UserError):
        return first_line[:LONGEST_REASON]
    return f"{type(error).__name__}: {first_line}"[:LONGEST_REASON]


def main() -> None:
    """Runs the check of the command line; ends the process with exit code 1 if it failed.

    The first rank that fails writes the reason to the file FAILURE; every one prints its traceback.

    Raises:
        OSError: the kernel refuses to end this process with its parent.
    """
    name, folder, ranks, mode = sys.argv[1:]
    die_with_parent()
    probe = Probe(Path(folder), int(ranks), rehearsal=mode == REHEARSAL)

    try:
        run(named(name), probe)
    except Exception as error:
        # Only the first rank that fails knows the cause; the others fail because it is gone.
        traceback.print_exc()
        try:
            with (probe.folder / FAILURE).open("x") as file:
                file.write(reason_of(error))
        except FileExistsError:
            print("another rank failed before", file=sys.stderr)
        sys.stderr.flush()
        # Leaving the process group would wait for other ranks, which may be gone.
        os._exit(1)


if __name__ == "__main__":
    main()
