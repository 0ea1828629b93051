"""What docs/generation.md shows can be typed."""

import subprocess

from dist_lm.launcher.compose import compose_config
from tests.documentation import block, run


def test_the_engine_of_the_page_answers(own_run, monkeypatch, capsys):
    own_run.path.rename(own_run.path.with_name("default"))
    monkeypatch.chdir(own_run.work.path.parent)
    run("generation.md", "engine.submit(")
    lines = capsys.readouterr().out.splitlines()
    assert sorted(line.split()[0] for line in lines) == ["0", "1"]
    assert all(line.split()[1] in ("eot", "length") for line in lines)


def test_the_quoted_values_of_the_page_arrive():
    command = block("generation.md", "bash", "stage.stop=").replace("python -m dist_lm.launch", "printf '%s\\0'")
    words = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True).stdout.split("\0")[:-1]
    stage = compose_config(words).stage
    assert stage.stop == ["\n\n", "END"]
    assert stage.stop_tokens == [4, 5]
    assert stage.logit_bias == {13: -2.5, 7: 1.0}
