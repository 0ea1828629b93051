"""The pool that docs/generation.md shows can be typed."""

import pytest

from dist_lm.config.file import save_config
from dist_lm.generation.request import Answer
from dist_lm.launcher.compose import compose_config
from tests.conftest import TINY
from tests.documentation import run
from tests.training_run import linked, write_untrained

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(200)]


def test_the_pool_of_the_page_answers(tiny_work, tmp_path, monkeypatch):
    trained = write_untrained(linked(tiny_work, tmp_path / "work"), "code", seed=0)
    save_config(compose_config(["stage=code", *TINY]), trained.config)
    monkeypatch.chdir(tmp_path)
    answers = run("generation.md", "Pool.start(")["answers"]
    assert [answer.request for answer in answers] == [f"r{i}" for i in range(8)]
    assert all(isinstance(answer, Answer) and answer.version == 2 for answer in answers)
