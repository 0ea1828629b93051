"""Runs of stage `generate` whose engines work in this process."""

import io
import json
from pathlib import Path

from dist_lm.launcher.process import Interrupt
from dist_lm.prepare.compose import compose_config
from dist_lm.prepare.plan import make_plan
from dist_lm.storage.run_directory import RunDirectory, WorkDirectory
from dist_lm.tracking.console import Console
from tests.conftest import TINY_MODEL

SETTINGS = (*TINY_MODEL, "stage=generate", "stage.max_new_tokens=12")
BAD = {3: "{", 50: json.dumps({"prompt": "x " * 400, "id": "long"})}  # line, of those below


def write_prompts(path: Path, count: int) -> Path:
    asked = [{"prompt": f"def f_{i}(x):\u2028\x85\n", "id": f"p{i}"} for i in range(count)]
    asked[0] |= {"kind": "first"}
    lines = [BAD.get(i) or json.dumps(one) for i, one in enumerate(asked)]
    path.write_text("\n".join(lines) + "\n")
    return path


def overrides_of(work: WorkDirectory, prompts: Path, *overrides: str) -> list[str]:
    return [*SETTINGS, f"work_dir={work.path}", f"stage.prompts={prompts}", "stage.prompts_per_shard=20", *overrides]


def plan_of(work: WorkDirectory, prompts: Path, *overrides: str):
    (stage,) = make_plan("generate", lambda _: compose_config(overrides_of(work, prompts, *overrides))).stages
    return stage


def parts_of(run: RunDirectory) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(run.samples.iterdir())}


class Screen(Console):
    def __init__(self) -> None:
        self.output, self.errors = io.StringIO(), io.StringIO()
        super().__init__(self.output, self.errors)


class AfterParts(Interrupt):
    """Asks to stop once there are some files."""

    def __init__(self, run: RunDirectory, parts: int) -> None:
        super().__init__()
        self._enough = lambda: run.samples.exists() and len(list(run.samples.glob("part-*"))) >= parts

    @property
    def requested(self) -> bool:
        return self._enough()
