"""Stage `generate` with prompts and weights that change on the way."""

import shutil
from collections.abc import Callable

import pytest

from dist_lm.errors import ArtefactError, ConfigError
from dist_lm.launcher.pool_run import run_pool_stage
from dist_lm.launcher.process import Interrupt
from dist_lm.stages.stage import Action
from tests.cluster.generation_runs import (
    AfterParts,
    Screen,
    parts_of,
    plan_of,
    write_prompts,
)
from tests.cluster.pool_of_one import Meanwhile
from tests.training_run import linked, write_untrained

pytestmark = pytest.mark.cluster


@pytest.mark.heavy
def test_answers_to_prompts_that_changed_while_they_were_read_are_not_kept(trained, cluster, tmp_path):
    prompts = write_prompts(tmp_path / "p.jsonl", 200)
    text = prompts.read_text()
    run = trained.run("generate", "changing20")

    def changed(change: Callable[[], object], size: int = 20) -> bool:
        prompts.write_text(text)
        planned = plan_of(trained, prompts, f"run_id=changing{size}", f"stage.prompts_per_shard={size}")
        return run_pool_stage(planned, cluster, Screen(), Meanwhile(change))

    half = text[: len(text) // 2]
    for other, size in ((text.replace("def", "del"), 20), (half, 20), (half, 1000), (text + '{"prompt": "x"}\n', 20)):
        with pytest.raises(ArtefactError, match=r"^stage\.prompts=.*p\.jsonl: not what .* began with: choose another"):
            changed(lambda other=other: prompts.write_text(other), size)
        assert parts_of(run) == {}
    with pytest.raises(ConfigError, match="no such file"):
        changed(prompts.unlink)
    assert parts_of(run) == {}
    assert changed(prompts.touch)
    assert len(parts_of(run)) == 10


@pytest.mark.heavy
def test_a_run_does_not_go_on_with_other_weights_at_the_same_place(trained, cluster, tmp_path):
    prompts = write_prompts(tmp_path / "p.jsonl", 60)
    work = linked(trained, tmp_path / "work")
    model = write_untrained(work, "code", 1)
    run = work.run("generate", "default")
    assert not run_pool_stage(plan_of(work, prompts), cluster, Screen(), AfterParts(run, 1))
    assert plan_of(work, prompts).action is Action.RESUME
    model.path.rename(tmp_path / "aside")
    write_untrained(work, "code", 2)
    with pytest.raises(ArtefactError, match=r"step_00000005: has changed since .*: choose another run_id$"):
        plan_of(work, prompts)
    shutil.rmtree(model.path)
    (tmp_path / "aside").rename(model.path)
    assert run_pool_stage(plan_of(work, prompts), cluster, Screen(), Interrupt())
