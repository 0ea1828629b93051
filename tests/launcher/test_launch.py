"""The command, as typed: exit codes, one line for what a user can mend, and a dry run that starts nothing.

Where the process is not what a test is about, it is this one.
"""

import os
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from dist_lm.errors import ConfigError
from dist_lm.launch import check_writable, main
from tests.conftest import TINY


def launch(*arguments, deadline_s=120, program=("-m", "dist_lm.launch"), **environment):
    return subprocess.run(
        [sys.executable, *program, *arguments],
        capture_output=True,
        text=True,
        timeout=deadline_s,
        check=False,
        env=os.environ | environment,
    )


# The launcher as the only child of a small process: fork counts the memory of the parent.
MEASURED = """
import resource, subprocess, sys
status = subprocess.call([sys.executable, "-m", "dist_lm.launch", *sys.argv[1:]])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=sys.stderr)
sys.exit(status)
"""


def test_a_small_limit_on_the_size_of_files_is_refused_before_anything_starts(tmp_path, monkeypatch):
    """Finds a launch that waits a minute for Ray and then names another reason."""
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (1 << 20, 1 << 20))
    with pytest.raises(ConfigError, match="ulimit -f"):
        check_writable(tmp_path / "work")
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("stage=code", "stage.stepz=1"), "did you mean stage.steps?"),
        (("stage=cod",), "stage=cod: did you mean stage=code? expected one of code"),
        (("stage=code", "model=lage"), "model=lage: did you mean model=large? expected one of"),
        (("stage=code", "stages.langage.steps=1"), "did you mean stages.language? "),
        (("stage=qqq",), "stage=qqq: expected one of code"),
        ((), "stage is not given"),
        (("stage=code", "stages.languge.steps=1"), "stages.languge.steps=1"),
        (("stage=code", "stages.code.steps=5"), "keys of code itself"),
        (("stage=language", "stages.code.steps=5"), "stages.code.steps=5"),
        (("stage=code", "tokenizer.vocab_size=8000"), "model.vocab_size=4096"),
        (("stage=code", "model.n_heads=7"), "model.n_heads=7"),
        (("stage=code", "parallel.dp_shard=3"), "parallel.dp_shard=3"),
        (("stage=code", "stage.global_batch=7"), "stage.global_batch=7"),
        (("stage=code", "parallel=fsdp_tp"), "parallel.tp=8"),
        (("stage=code", "-m"), "-m"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, arguments, words, monkeypatch, capsys):
    own = [*([f"work_dir={tmp_path}/work"] if arguments else []), "cluster.ranks_per_node=2"]
    monkeypatch.setattr(sys, "argv", ["dist_lm.launch", *arguments, *own])
    with pytest.raises(SystemExit) as ended:
        main()
    output, errors = capsys.readouterr()
    assert (ended.value.code, output) == (2, "")
    assert errors.count("\n") == 1
    assert errors.startswith("error: ")
    assert words in errors
    assert list(tmp_path.iterdir()) == []


@pytest.mark.heavy
def test_a_work_directory_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    done = launch("stage=tokenizer", f"work_dir={tmp_path}/file/work")
    assert done.returncode == 2
    assert done.stderr.startswith("error: work_dir=")
    assert done.stderr.count("\n") == 1


def test_a_work_directory_may_be_tried_by_several_commands_at_once(tmp_path):
    work = tmp_path / "work"
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(check_writable, [work] * 400))
    assert list(work.iterdir()) == []


@pytest.mark.heavy
def test_a_ray_head_that_does_not_answer_is_one_line_after_a_bounded_wait(tiny_work):
    done = launch(
        "stage=language",
        *TINY,
        f"work_dir={tiny_work.path}",
        "run_id=nowhere",
        "cluster=ray",
        "cluster.address=127.0.0.1:9",
        "cluster.connect_timeout_s=1",
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: cluster.address=127.0.0.1:9")
    assert done.stderr.count("\n") == 1


@pytest.mark.heavy
def test_a_dry_run_says_what_a_rank_holds_and_starts_nothing(tmp_path):
    done = launch(
        "stage=language", "model=nano", "parallel=auto", "dry_run=true", f"work_dir={tmp_path}/work", COLUMNS="200"
    )
    assert done.returncode == 0, done.stderr
    for words in ("2.55 M", "chosen", "tokenizer", "shards", "language", "peak memory", "optimizer"):
        assert words in done.stdout
    assert not (tmp_path / "work").exists()


@pytest.mark.heavy
def test_a_thousand_ranks_are_played_in_little_memory():
    """Finds a dry run whose memory grows with the number of ranks. Two layers take a tenth of the time of all 32."""
    cluster = ("cluster.nodes=128", "cluster.ranks_per_node=8", "hardware=h100")
    shape = ("model=large", "model.n_layers=2", "parallel=fsdp_tp", *cluster)
    measured = ("-c", MEASURED)
    done = launch("stage=language", *shape, "dry_run=true", deadline_s=280, program=measured, COLUMNS="200")
    assert done.returncode == 0, done.stderr
    words = done.stdout.split()
    assert {"dp_replicate=2", "dp_shard=64", "tp=8", "1024"} <= set(words)
    held = next(line.split()[1:] for line in done.stdout.splitlines() if line.startswith("parameters "))
    assert held[1::2] == ["MiB"] * 3  # of rank 0, the first with padded heads, the last
    # 164 M parameters over 512 shards, in fp32; ranks 6 and 7 hold padded heads
    assert [float(size) for size in held[::2]] == pytest.approx([4 * 163_882_400 / 512 / 2**20] * 3, rel=0.1)
    assert int(done.stderr.split()[-1]) < 2 << 20  # KiB, of the largest process


@pytest.mark.heavy
def test_help_and_the_resolved_configuration_are_shown():
    shown = launch("--help")
    assert shown.returncode == 0
    groups_of_keys = ("rlhf.*", "eval.*", "profile.*", "stages.NAME.KEY")
    for words in ("stage=code", "model:", "large", "recipe: tuned\n", *groups_of_keys):
        assert words in shown.stdout
    # Files of conf/recipe that a size or an experiment takes by itself are no choices.
    assert "nano_code" not in shown.stdout
    assert max(map(len, shown.stdout.splitlines())) <= 120
    resolved = launch("stage=language", "model=large", "--cfg", "job")
    assert resolved.returncode == 0
    assert "d_model: 1600" in resolved.stdout
    assert "vocab_size: 32000" in resolved.stdout
    earlier = launch("stage=code", "stages.language.steps=3", "--cfg", "job")
    assert earlier.returncode == 0, earlier.stderr
    wrong = launch("stage.stepz=3", "--cfg", "job")
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)


@pytest.mark.heavy
def test_shell_completion_is_offered():
    done = launch("-sc", "install=bash")
    assert done.returncode == 0
    assert "complete" in done.stdout
