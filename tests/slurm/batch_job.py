"""A batch job of this project, seen from the outside."""

import re
import time
from pathlib import Path

from dist_lm.storage.run_directory import WorkDirectory
from tests.cluster.waiting import eventually
from tests.slurm.real_slurm import RealSlurm


class BatchJob:
    """One job and its work directory."""

    def __init__(
        self,
        slurm: RealSlurm,
        work: WorkDirectory,
        script: str,
        *arguments: str,
        nodes: int = 2,
        options: tuple[str, ...] = (),
    ) -> None:
        """Submit it; `options` are sbatch's."""
        self.submitted = time.time()
        self.slurm, self.work = slurm, work
        self.id = slurm.submit(
            script,
            f"work_dir={work.path}",
            *arguments,
            options=(f"--nodes={nodes}", "--time=60", *options),
            directory=work.path.parent,
        )
        self.directory: Path = work.path / "slurm" / str(self.id)

    @property
    def log(self) -> str:
        """batch.log so far."""
        path = self.directory / "batch.log"
        return path.read_text() if path.exists() else ""

    def everything(self) -> str:
        """All logs of the job, for a failed assertion."""
        logs = sorted(self.directory.glob("*.log"))
        return "\n".join(f"== {path.name}\n{path.read_text(errors='replace')[-4000:]}" for path in logs)

    def state(self) -> str:
        return self.slurm.state(self.id)

    def wait_for_log(self, text: str, seconds: float = 480) -> None:
        eventually(f"{text!r} in the log of job {self.id}", lambda: text in self.log, seconds)

    def finish(self, state: str = "COMPLETED", seconds: float = 900) -> None:
        """Wait for its end, which must be `state`; nothing of it is left then."""
        ended = self.slurm.wait(self.id, seconds=seconds)
        assert ended == state, f"{ended}\n{self.everything()}"
        self.check_nothing_left()

    def check_nothing_left(self, seconds: float = 60) -> None:
        """No process on any node, no token, no file outside the work directory."""
        eventually("no process is left", lambda: not self.slurm.job_processes(), seconds)
        assert not (self.directory / "token").exists()
        slurm = self.slurm
        files = slurm.run("find", "/tmp", "/dev/shm", "-xdev", "-not", "-type", "d").splitlines()
        assert files == []
        directories = slurm.run("find", "/tmp", "-mindepth", "1", "-maxdepth", "1", "-printf", "%f\n").splitlines()
        assert not [name for name in directories if name.startswith(("dl", "ray"))], directories
        beside = {path for path in self.work.path.parent.iterdir() if path != self.work.path}
        assert beside == set(), beside
        assert list((slurm.root / "home").iterdir()) == []

    def starts(self) -> int:
        """How often Ray was started for it, over all requeues."""
        return len(re.findall(r"starting Ray at", self.log))
