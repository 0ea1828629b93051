"""What a check works with, and the program of one check: `python -m dist_lm.gpu_check.probe NAME FOLDER RANKS MODE`.

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
from typing import TYPE_CHECKING

from dist_lm.config.root import Config
from dist_lm.errors import UserError
from dist_lm.gpu_check.checks import Check, named
from dist_lm.prepare.compose import compose_config
from dist_lm.storage import durable
from dist_lm.storage.process import die_with_parent

if TYPE_CHECKING:
    from dist_lm.parallel.mesh import World

CARD, REHEARSAL = "card", "rehearsal"
MARK = "DIST_LM_GPU_CHECK"  # environment variable by which the processes of a check are found
FACTS, FAILURE = "facts.json", "failure.txt"
LONGEST_REASON = 300  # characters
COLLECTIVE_S = 60.0


class CheckFailedError(UserError):
    """A check found something wrong; the message says what."""


def expect(holds: bool, otherwise: str) -> None:
    """Fail the check unless `holds`."""
    if not holds:
        raise CheckFailedError(otherwise)


@dataclass
class Probe:
    """Device, sizes and files of one check."""

    folder: Path  # for files of the check
    ranks: int  # GPUs that the check may use
    rehearsal: bool  # on a CPU, at tiny sizes
    joined: "World | None" = None  # the ranks, where the check has a process group
    facts: dict[str, float] = field(default_factory=dict)

    @property
    def device_type(self) -> str:
        return "cpu" if self.rehearsal else "cuda"

    @property
    def world(self) -> "World":
        assert self.joined, "this check has no process group"
        return self.joined

    def note(self, name: str, value: float) -> None:
        """Record a figure, whose unit is the last word of its name."""
        self.facts[name] = float(f"{value:.5g}")
        if self.joined is None or self.joined.is_first:
            durable.write_text(self.folder / FACTS, json.dumps(self.facts))

    def config(self, *overrides: str, tiny: tuple[str, ...] = ()) -> Config:
        """The configuration of a training stage.

        Args:
            tiny: overrides that a rehearsal adds.
        """
        ours = ("stage=language", "tracking=none", f"device={self.device_type}", *overrides)
        return compose_config([*ours, *(tiny if self.rehearsal else ())])


def run(check: Check, probe: Probe) -> None:
    """Run one check in this process."""
    function = pkgutil.resolve_name(check.place)
    if check.runs == "launcher":
        function(probe)
        return
    import torch

    from dist_lm.parallel.mesh import process_group

    if probe.rehearsal:  # traces all the same, but Inductor and g++ would take minutes
        torch.compiler.set_stance("default", force_backend="eager")
    with process_group(probe.device_type, COLLECTIVE_S) as probe.joined:
        function(probe)


def reason_of(error: BaseException) -> str:
    """The first line of an error; errors that are not about a finding begin with their type."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    words = lines[0] if lines else ""
    kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    return f"{kind}{words}"[:LONGEST_REASON]


def main() -> None:
    """Run the check; exit code 1 if it failed."""
    name, folder, ranks, mode = sys.argv[1:]
    die_with_parent()
    probe = Probe(Path(folder), int(ranks), rehearsal=mode == REHEARSAL)
    try:
        run(named(name), probe)
    except Exception as error:
        traceback.print_exc()
        try:
            with (probe.folder / FAILURE).open("x") as file:
                file.write(reason_of(error))
        except FileExistsError:
            print("another rank failed before", file=sys.stderr)
        sys.stderr.flush()
        os._exit(1)  # other ranks may be gone, and leaving the process group would wait for them


if __name__ == "__main__":
    main()
