"""Building what runs share, the tokenizer and the corpora: one command at a time in a work directory."""

import importlib
import math
from pathlib import Path

from dist_lm.launcher.plan import PlannedStage
from dist_lm.storage.lock import locked
from dist_lm.storage.run_directory import WorkDirectory
from dist_lm.tracking.console import Console


def build_artefact(stage: PlannedStage, console: Console) -> str:
    """Carry out a stage that does not train, and say what there is then.

    What another command is just building is waited for and used.

    Raises:
        ArtefactError: what the other command built is not what this one needs.
    """
    module = importlib.import_module(f"dist_lm.stages.{stage.info.name}")
    work = WorkDirectory(Path(stage.config.work_dir))

    def wait_for(owner: str) -> None:
        console.line(f"{stage.info.name}: waiting for {owner}, which is building in {work.path}")

    with locked(work.build_lock, wait_s=math.inf, on_wait=wait_for):
        found = module.inspect(stage.config)
        if found.ready:
            return found.detail
        module.build(stage.config, console)
        return module.inspect(stage.config).detail
