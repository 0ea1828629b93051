"""Plans of a small work directory, and runs that are there before."""

import json
from dataclasses import asdict

from dist_lm.config.root import save_config
from dist_lm.prepare.compose import overrides_of
from dist_lm.prepare.plan import make_plan
from dist_lm.training import checkpoint_files
from dist_lm.training.state import TrainState
from tests.conftest import composed, tiny


def plan_of(work, *overrides, target="code"):
    command = [f"stage={target}", *tiny(target), f"work_dir={work.path}", *overrides]
    return make_plan(target, lambda stage: composed(overrides_of(stage, target, command)))


def actions(plan):
    return {stage.name: stage.action for stage in plan.stages}


def make_run(work, stage, *overrides, done=False, checkpoint=False):
    config = composed([f"stage={stage}", *tiny(stage), f"work_dir={work.path}", *overrides])
    run = work.run(stage, config.run_id)
    run.create()
    plan = plan_of(work, *overrides, target=stage)
    save_config(plan.stages[-1].config, run.config)
    if checkpoint:
        directory = run.checkpoints / checkpoint_files.step_name(5)
        directory.mkdir()
        checkpoint_files.write_state(directory, TrainState(step=5), {})
        checkpoint_files.write_pointer(run.checkpoints, checkpoint_files.LATEST, directory)
    if done:
        directory = run.checkpoints / checkpoint_files.step_name(config.stage.steps)
        directory.mkdir()
        checkpoint_files.write_state(directory, TrainState(step=config.stage.steps), asdict(config.model))
        checkpoint_files.write_pointer(run.checkpoints, checkpoint_files.LATEST, directory)
        run.result.write_text(json.dumps({"steps": config.stage.steps}))
    return run
