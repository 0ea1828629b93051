"""The record of the base of a critic's adapters in a checkpoint."""

import json
from pathlib import Path

import pytest

from dist_lm.errors import ArtefactError
from dist_lm.stages.rlhf.models import CRITIC, check_critic
from dist_lm.training.checkpoint_files import STAGE

BASE = {"base": "work/runs/reward/default", "base_sha256": "a" * 64}


def write(directory: Path, record: str) -> None:
    (directory / STAGE).mkdir()
    (directory / STAGE / CRITIC).write_text(record)


@pytest.mark.parametrize("record", ["{", "[]", "{}", '{"base": "x"}', "null"])
def test_a_damaged_record_is_refused_with_its_checkpoint(tmp_path: Path, record: str) -> None:
    """Finds a traceback in place of the name of the checkpoint."""
    write(tmp_path, record)
    with pytest.raises(ArtefactError, match=rf"^checkpoint .*: {CRITIC} is not what stage rlhf writes"):
        check_critic(tmp_path, BASE)


def test_another_base_is_refused_with_both_names(tmp_path: Path) -> None:
    """Finds adapters that go on with the weights of another critic."""
    write(tmp_path, json.dumps(BASE))
    check_critic(tmp_path, BASE)
    with pytest.raises(ArtefactError, match=r"belong to work/runs/reward/default .* found other"):
        check_critic(tmp_path, {"base": "other", "base_sha256": "b" * 64})
