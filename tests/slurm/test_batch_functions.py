"""Functions of the batch scripts by themselves: without Slurm, whose commands are stubs here."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]
SECONDS = 30  # for a script that hangs
# a process that does not end when it is asked to; its process id is in $!
STUBBORN = "trap '' TERM USR1; sleep 60 >/dev/null 2>&1 & trap - TERM USR1\n"
NO_WAIT = "pause() { sleep 0.02; }\n"
AT_ONCE = "ask_wait=0 step_wait=0 kill_wait=0"
PATIENCE = "cluster.stop_timeout_s=900"  # the launcher's is not shorter than that of the script
OF_JOB = ("cluster.nodes=2", PATIENCE)


class BatchShell:
    """A bash that has sourced slurm/common.sh, in a job of two nodes."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.job_directory = directory, directory / "work" / "slurm" / "7"
        self.stubs = directory / "stubs"
        self.stubs.mkdir()
        self.job_directory.mkdir(parents=True)
        self.environ = {
            "PATH": f"{self.stubs}:{os.environ['PATH']}",
            "LANG": "C.UTF-8",
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NAME": "job",
            "SLURM_JOB_PARTITION": "long",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_SUBMIT_DIR": str(directory),
            "SLURMD_NODENAME": "n1",
        }

    def stub(self, command: str, script: str = "") -> None:
        """Put a script in the place of a command; it notes its arguments first, a call a line."""
        path = self.stubs / command
        path.write_text(f'#!/usr/bin/env bash\necho "$@" >>"{path}.calls"\n{script}\n')
        path.chmod(0o755)

    def calls(self, command: str) -> list[str]:
        """The arguments of each call of a stub."""
        path = self.stubs / f"{command}.calls"
        return path.read_text().splitlines() if path.exists() else []

    def try_to(self, script: str, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        """Run a script after the functions."""
        start = f'set -euo pipefail; root={CHECKOUT}; . "$root/slurm/common.sh"\n'
        start += f'work_dir={self.directory}/work job_dir={self.job_directory} token="{self.token}"\n'
        return subprocess.run(
            ["bash", "-c", start + script, "bash", *arguments],
            env=self.environ | environ,
            cwd=self.directory,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )

    def run(self, script: str, *arguments: str, **environ: str) -> list[str]:
        """The same for a script that must not fail; the lines it printed."""
        done = self.try_to(script, *arguments, **environ)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.splitlines()

    @property
    def token(self) -> Path:
        return self.job_directory / "token"


@pytest.fixture
def shell(tmp_path: Path) -> BatchShell:
    return BatchShell(tmp_path)


@pytest.mark.parametrize(
    ("stop", "code", "head_well", "before", "outcome"),
    [
        ("", "0", "yes", "none", "0"),
        ("", "1", "yes", "none", "1"),
        ("", "2", "yes", "none", "2"),
        ("", "130", "yes", "none", "130"),
        ("", "143", "yes", "none", "143"),
        ("", "75", "yes", "none", "requeue"),
        ("", "138", "yes", "none", "requeue"),
        ("", "137", "yes", "none", "lost"),
        ("", "none", "no", "none", "lost"),
        # Ray on the head was not well: an exit 0 is believed the second time, nothing else ever
        ("", "0", "no", "none", "lost"),
        ("", "0", "no", "1", "lost"),
        ("", "0", "no", "0", "0"),
        ("", "none", "no", "0", "lost"),
        ("", "1", "no", "0", "lost"),
        ("", "2", "no", "none", "lost"),
        ("", "75", "no", "none", "lost"),
        ("", "143", "no", "none", "lost"),
        ("USR1", "0", "yes", "none", "0"),
        ("USR1", "2", "yes", "none", "2"),
        ("USR1", "1", "yes", "none", "requeue"),
        ("USR1", "138", "no", "none", "requeue"),
        ("USR1", "137", "no", "none", "requeue"),
        ("USR1", "none", "no", "none", "requeue"),
        ("USR1", "0", "no", "none", "lost"),
        ("TERM", "0", "yes", "0", "143"),
        ("TERM", "137", "no", "none", "143"),
        ("TERM", "none", "no", "none", "143"),
    ],
)
def test_outcome(shell: BatchShell, stop: str, code: str, head_well: str, before: str, outcome: str) -> None:
    assert shell.run('outcome_of "$@"', stop, code, head_well, before) == [outcome]


# signal_steps makes the file `asked`
HEADS = {
    "stops when asked to": "trap '' TERM; (until [ -e asked ]; do sleep 0.02; done) & trap - TERM",
    "finds its Ray dead": "trap '' TERM; (until [ -e asked ]; do sleep 0.02; done; exit 1) & trap - TERM",
    "has to be killed": f"step_wait=0; {STUBBORN}",
    "has died": "(exit 1) & while running $!; do pause; done",
    "has left with 0": "(exit 0) & while running $!; do pause; done",
}


@pytest.mark.parametrize(
    ("head", "before", "outcome"),
    [
        ("stops when asked to", "none", "0"),
        ("has to be killed", "none", "0"),
        ("has died", "none", "lost"),
        ("has died", "0", "0"),
        ("has left with 0", "none", "lost"),
        ("finds its Ray dead", "none", "lost"),
    ],
)
def test_a_driver_that_leaves_with_0_while_the_head(shell: BatchShell, head: str, before: str, outcome: str) -> None:
    shell.stub("python")
    script = f"""{NO_WAIT} start_ray() {{ {HEADS[head]}
head_step=$!; }}
signal_steps() {{ : >asked; signal_processes "$1" "$head_step"; }}
tell_driver() {{ :; }} # it leaves by itself
head=n1 head_address=10.0.0.1:6400 code_before={before} ask_wait=0
run_once >&2
echo "$outcome $code_before"
"""
    assert shell.run(script) == [f"{outcome} 0"]


def test_a_start_without_a_driver_is_lost(shell: BatchShell) -> None:
    assert shell.run('start_ray() { return 1; }; code_before=0; run_once >&2; echo "$outcome $code_before"') == [
        "lost none"
    ]


def test_the_head_is_asked_before_a_signal_is_sent(shell: BatchShell) -> None:
    shell.stub("squeue", "echo 7.0 ray_head")
    shell.stub("scancel", f"[ ! -e {shell.job_directory}/stop ] && : >{shell.job_directory}/signalled")
    head = "(until [ -e $job_dir/stop ]; do sleep 0.02; done; ! [ -e $job_dir/signalled ] && rm $job_dir/stop) &"
    assert shell.run(f'{NO_WAIT} {head} head_step=$!; stop_ray; echo "$head_code"') == ["0"]
    assert shell.calls("scancel")[0] == "--signal=TERM 7.0"


def test_a_head_that_does_not_answer_is_sent_the_signal(shell: BatchShell) -> None:
    shell.stub("squeue", "echo 7.0 ray_head")
    shell.stub("scancel", f": >{shell.job_directory}/signalled")
    head = "(until [ -e $job_dir/signalled ]; do sleep 0.02; done; ! [ -e $job_dir/stop ]) &"
    assert shell.run(f'{NO_WAIT} {head} head_step=$! ask_wait=0; stop_ray; echo "$head_code"') == ["0"]


def test_a_srun_that_hangs_does_not_hold_up_the_end(shell: BatchShell) -> None:
    shell.stub("squeue", "echo 7.0 ray_head")
    shell.stub("scancel")
    script = f'{STUBBORN} head_step=$! {AT_ONCE}; stop_ray; echo "$head_code"; kill -0 $! || echo gone'
    assert shell.run(script) == ["killed", "gone"]
    assert shell.calls("scancel") == ["--signal=TERM 7.0", "--signal=KILL 7.0"]


def test_clean_up_after_a_failure_is_complete(shell: BatchShell) -> None:
    shell.token.touch()
    shell.stub("squeue", "echo 7.0 ray_head")
    shell.stub("scancel")
    done = shell.try_to(
        f"""{NO_WAIT} sleep 60 >/dev/null & driver=$!
{STUBBORN} head_step=$! {AT_ONCE}
trap 'clean_up; if running "$driver" || running "$head_step"; then echo one is left; fi' EXIT
(exit 3)"""
    )
    assert done.returncode == 3
    assert done.stdout.endswith("cleaned up\n"), done.stdout
    assert not shell.token.exists()


@pytest.mark.parametrize(
    ("container", "killed"), [("on_head=(srun)", ["--signal=KILL 7.3"]), ("", [])], ids=["container", "venv"]
)
def test_end_of_a_driver_that_does_not_leave(shell: BatchShell, container: str, killed: list[str]) -> None:
    shell.stub("squeue", r"printf '%s\n' '7.0 ray_head' '7.batch batch' '7.3 driver'")
    shell.stub("scancel")
    shell.run(f"{NO_WAIT} {STUBBORN} driver=$!; {container}\nend_driver 0; while running $driver; do pause; done")
    assert shell.calls("scancel") == killed


def test_signals_go_to_every_step_but_the_scripts_own(shell: BatchShell) -> None:
    shell.stub("squeue", r"printf '%s\n' '7.0 ray_head' '7.1 a b' '7.batch batch' '7.extern extern' 7.interactive")
    shell.stub("scancel", "exit 1")  # it has ended meanwhile
    shell.run("signal_steps TERM")
    assert shell.calls("scancel") == ["--signal=TERM 7.0", "--signal=TERM 7.1"]


@pytest.mark.parametrize(
    ("given", "work_dir", "passed"),
    [
        ([], "{}/work", ["stage=pipeline", "model=large", *OF_JOB]),
        (["model=nano"], "{}/work", ["stage=pipeline", *OF_JOB, "model=nano"]),
        (
            ["cluster.nodes=1", "x=a b"],
            "{}/work",
            ["stage=pipeline", "model=large", PATIENCE, "cluster.nodes=1", "x=a b"],
        ),
        (["model.d_model=8"], "{}/work", ["stage=pipeline", "model=large", *OF_JOB, "model.d_model=8"]),
        (["work_dir=mine"], "{}/mine", ["stage=pipeline", "model=large", *OF_JOB]),
        (["work_dir=/a", "work_dir=/b"], "/b", ["stage=pipeline", "model=large", *OF_JOB]),
    ],
)
def test_arguments(shell: BatchShell, given: list[str], work_dir: str, passed: list[str]) -> None:
    directory = work_dir.format(shell.directory)
    script = r"""read_arguments stage=pipeline model=large -- "$@"; printf '%s\n' "$token" "${launch_arguments[@]}" """
    assert shell.run(script, *given) == [f"{directory}/slurm/7/token", *passed, f"work_dir={directory}"]


@pytest.mark.parametrize("there", ["", "echo old >$token", "ln -s victim $token", "ln -s nothing $token"])
def test_token(shell: BatchShell, there: str) -> None:
    (shell.job_directory / "victim").write_text("untouched")
    shell.run(f"umask 000; {there}\nmake_token; [ $RAY_AUTH_TOKEN_PATH = $token ]")
    assert not shell.token.is_symlink()
    assert shell.token.stat().st_mode & 0o777 == 0o600
    assert len(shell.token.read_text()) == 64
    assert (shell.job_directory / "victim").read_text() == "untouched"
    assert not (shell.job_directory / "nothing").exists()


@pytest.mark.parametrize("target", ["victim", "nothing"])
def test_a_link_that_comes_back_in_the_place_of_the_token(shell: BatchShell, target: str) -> None:
    (shell.job_directory / "victim").write_text("untouched")
    # start_ray is called in a condition, where bash does not stop at a failure by itself
    done = shell.try_to(f"ln -s {target} $token; rm() {{ :; }}; if ! make_token; then :; fi")
    assert done.returncode == 2
    assert f"error: {shell.token}: cannot be created on n1" in done.stdout
    assert (shell.job_directory / "victim").read_text() == "untouched"
    assert not (shell.job_directory / "nothing").exists()


@pytest.mark.parametrize(
    ("environ", "features", "added"),
    [
        ({}, "(null)", set()),
        ({"SLURM_GPUS_PER_NODE": "a100:4", "SLURM_GPUS_ON_NODE": "8"}, "(null)", {"--gpus-per-node=a100:4"}),
        ({"SLURM_GPUS_ON_NODE": "8"}, "(null)", {"--gpus-per-node=8"}),  # --gres, --gpus
        ({"SLURM_GPUS_ON_NODE": "0"}, "(null)", set()),
        ({"SLURM_JOB_ACCOUNT": "a", "SLURM_JOB_QOS": "q"}, "(null)", {"--account=a", "--qos=q"}),
        ({"SLURM_JOB_RESERVATION": "r"}, "ib&(a100|h100)", {"--reservation=r", "--constraint=ib&(a100|h100)"}),
    ],
)
def test_a_replacement_asks_for_what_the_job_asked_for(
    shell: BatchShell, environ: dict[str, str], features: str, added: set[str]
) -> None:
    shell.stub("sbatch", "echo 8")
    shell.stub("scontrol", f"printf '%s\\n' '   Comment=Features=x' '   Features={features} DelayBoot=00:00:00'")
    shell.run("head_address=10.0.0.1:6400; submit_replacement", **environ)
    (call,) = shell.calls("sbatch")
    options = set(call.split())
    assert {"--nodes=1", "--partition=long", f"--output={shell.job_directory}/batch.log"} <= options
    asked = ("--gpus", "--account", "--qos", "--reservation", "--constraint", "--time")
    assert {option for option in options if option.startswith(asked)} == added
    assert (shell.job_directory / "replacements").read_text() == "8\n"


@pytest.mark.parametrize(
    ("left", "minutes"), [("3600", {"--time=60", "--time=61"}), ("30", {"--time=1"}), ("-90", set())]
)
def test_a_replacement_ends_with_the_job(shell: BatchShell, left: str, minutes: set[str]) -> None:
    shell.stub("sbatch", "echo 8")
    shell.stub("scontrol")
    shell.run(f"head_address=10.0.0.1:6400 SLURM_JOB_END_TIME=$(($(date +%s) + {left})); submit_replacement")
    times = {option for option in shell.calls("sbatch")[0].split() if option.startswith("--time")}
    assert times <= minutes
    assert bool(times) == bool(minutes)


@pytest.mark.parametrize(
    ("left", "seconds"),
    [
        (None, {75}),
        (100_000, {900}),
        (345, {300, 299, 298}),
        (46, {10}),
        (1, {10, 75}),
        (-60, {75}),  # the limit was put off while the job ran
    ],
)
def test_seconds_for_a_checkpoint(shell: BatchShell, left: int | None, seconds: set[int]) -> None:
    limit = "" if left is None else f"SLURM_JOB_END_TIME=$(($(date +%s) + {left})); "
    (found,) = shell.run(f"{limit}seconds_for_a_checkpoint")
    assert int(found) in seconds


def test_a_job_is_requeued_again_only_after_progress(shell: BatchShell) -> None:
    shell.stub("scontrol")
    assert shell.try_to("requeue").returncode == 0
    again = shell.try_to("requeue")
    assert again.returncode == 1
    assert "error: not requeued: no progress since the last requeue" in again.stdout
    latest = shell.directory / "work" / "runs" / "language" / "default" / "checkpoints" / "LATEST"
    latest.parent.mkdir(parents=True)
    latest.write_text("step_10")
    assert shell.try_to("requeue").returncode == 0
    part = shell.directory / "work" / "runs" / "generate" / "default" / "samples" / "part-00000.jsonl"
    part.parent.mkdir(parents=True)
    part.touch()
    assert shell.try_to("requeue").returncode == 0
    assert shell.try_to("requeue").returncode == 1
    assert shell.calls("scontrol") == ["requeue 7"] * 3


@pytest.mark.parametrize(
    ("path", "content", "counts"),
    [
        ("runs/language/mine/checkpoints/LATEST", "step_10", True),
        ("runs/import/model/checkpoints/LATEST", "step_0", True),
        ("runs/evaluate/mine/samples/code_default/own_sql-000.jsonl", "{}", True),
        ("runs/generate/mine/samples/part-00000.jsonl", "{}", True),
        ("corpora/language/journal.jsonl", '{"format": 1}\n{"begun": "train-000000.tar"}\n{"finished": {}}', True),
        ("corpora/language/journal.jsonl", '{"format": 1}\n{"begun": "train-000000.tar"}', False),
        ("runs/language/default/checkpoints/LATEST", "step_10", False),  # of others in the same work directory
        ("runs/generate/default/samples/part-00000.jsonl", "{}", False),
    ],
)
def test_progress_is_what_this_run_has_finished(shell: BatchShell, path: str, content: str, counts: bool) -> None:
    file = shell.directory / "work" / path
    script = f"""read_arguments -- "work_dir=$work_dir" run_id=mine; before=$(progress)
mkdir -p {file.parent}; printf '%s\\n' "$1" >{file}; [ "$before" = "$(progress)" ] && echo none || echo some"""
    assert shell.run(script, content) == ["some" if counts else "none"]


@pytest.mark.parametrize(("given", "counts"), [("experiment=mine", "some"), ("stage=code", "none")])
def test_a_run_that_a_file_of_the_user_names_makes_progress(shell: BatchShell, given: str, counts: str) -> None:
    file = shell.directory / "work" / "runs" / "code" / "mine" / "result.json"
    script = f"""read_arguments -- "work_dir=$work_dir" {given}; before=$(progress)
mkdir -p {file.parent}; echo done >{file}; [ "$before" = "$(progress)" ] && echo none || echo some"""
    assert shell.run(script) == [counts]


@pytest.mark.parametrize("name", ["train_large", "rlhf_large", "agents_large", "generate", "serve"])
def test_a_job_without_a_checkout_says_so_where_it_was_submitted(shell: BatchShell, name: str) -> None:
    shell.stub("scontrol", "exit 1")
    script = (CHECKOUT / "slurm" / f"{name}.sh").read_text()
    home = shell.directory / "home"
    home.mkdir()
    done = subprocess.run(
        ["bash", "-c", script],
        env=shell.environ | {"HOME": str(home)},
        capture_output=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 2
    for directory in (shell.directory, home):
        assert "no checkout of dist_lm" in (directory / "slurm-7.out").read_text()


def test_a_job_that_serves_takes_the_arguments_of_the_command(shell: BatchShell) -> None:
    """Finds a job that serves something else, or writes its log where nobody looks."""
    shell.stub("scontrol", f"echo '   Command={CHECKOUT}/slurm/serve.sh'")
    shell.stub("python", "echo it serves")
    venv = shell.directory / "venv" / "bin"
    venv.mkdir(parents=True)
    (venv / "activate").touch()
    done = subprocess.run(
        ["bash", "-c", (CHECKOUT / "slurm" / "serve.sh").read_text(), "bash", "a run", "--port", "8080"],
        env=shell.environ
        | {"HOME": str(shell.directory), "DIST_LM_VENV": str(venv.parent), "SLURM_JOB_NUM_NODES": "1"},
        capture_output=True,
        timeout=SECONDS,
        check=False,
    )
    log = (shell.directory / "slurm-7.out").read_text()
    assert done.returncode == 0, log
    assert shell.calls("python") == ["-m dist_lm serve a run --port 8080"]
    assert "it serves" in log


def test_a_server_in_a_container_is_not_killed_by_its_srun(shell: BatchShell) -> None:
    """Finds a TERM that goes to srun, which kills its step at once: answers under way get no time."""
    server = shell.directory / "server"
    shell.stub("scontrol", f"echo '   Command={CHECKOUT}/slurm/serve.sh'")
    shell.stub("squeue", "echo 7.0 driver")
    shell.stub("scancel", f"kill -s TERM $(<{server})")
    loop = "while :; do sleep 0.02; done"
    step = f"trap 'echo answers are complete; exit 0' TERM; echo \\$\\$ >{server}; {loop}"
    shell.stub("srun", f'bash -c "{step}" &\ntrap "echo killed; kill -s KILL $!; exit 137" TERM\nwait $!')
    environ = shell.environ | {"HOME": str(shell.directory), "SLURM_JOB_NUM_NODES": "1", "DIST_LM_CONTAINER": "image"}
    script = (CHECKOUT / "slurm" / "serve.sh").read_text()
    with subprocess.Popen(["bash", "-c", script, "bash", "run"], env=environ) as job:
        try:
            deadline = time.monotonic() + SECONDS
            while not (server.exists() and server.read_text()):
                assert time.monotonic() < deadline, "no server has started"
                time.sleep(0.02)
            job.send_signal(signal.SIGTERM)
            code = job.wait(SECONDS)
        finally:
            job.kill()
    log = (shell.directory / "slurm-7.out").read_text()
    assert "answers are complete" in log
    assert "killed" not in log
    assert code == 0, log
    assert shell.calls("scancel") == ["--signal=TERM 7.0"]


# Sources what serve.sh does on several nodes, with a head that runs until it is told to stop.
OF_SERVERS = f"""{NO_WAIT} {AT_ONCE}
. "$root/slurm/serve_nodes.sh"
start_ray() {{ make_token; sleep 60 >/dev/null & head_step=$!; }}
signal_steps() {{ signal_processes "$1" "$head_step"; }}
find_nodes() {{ head=n1 head_address=10.0.0.1:6407; }}
"""


def test_a_server_over_several_nodes_has_their_ray(shell: BatchShell) -> None:
    """Finds a server without its actors, a Ray without a token or that outlives the server, and a lost exit code."""
    shell.stub("python", 'echo "token in $RAY_AUTH_TOKEN_PATH"; exit 3')
    done = shell.try_to(f'{OF_SERVERS} serve_over_nodes "a run" --actors 2')
    assert done.returncode == 3, done.stdout + done.stderr
    assert shell.calls("python") == [
        "-m dist_lm serve --actors -1 --ray 10.0.0.1:6407 --nodes 2 a run --actors 2",
    ]
    token = shell.directory / "slurm-7" / "token"
    assert f"token in {token}" in done.stdout
    assert not token.exists()
    assert "cleaned up" in done.stdout


def test_a_server_over_several_nodes_ends_at_term_by_itself(shell: BatchShell) -> None:
    """Finds a server that is killed while answers are under way."""
    stub = "trap 'echo answers are complete; exit 0' TERM; kill -s TERM $PPID; while :; do sleep 0.02; done"
    shell.stub("python", stub)
    done = shell.try_to(f"{OF_SERVERS} serve_over_nodes run")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "answers are complete" in done.stdout


def test_a_server_ends_with_its_ray(shell: BatchShell) -> None:
    """Finds a server that answers with errors alone until the time limit."""
    shell.stub("python", "exec sleep 60")
    done = shell.try_to(f"{OF_SERVERS} start_ray() {{ true & head_step=$!; }}\nserver_wait=0 serve_over_nodes run")
    assert done.returncode == 1
    assert "error: Ray on the head node n1 has ended" in done.stdout


@pytest.mark.parametrize(("version", "refused"), [("3 2", True), ("4 3", True), ("4 4", False), ("5 0", False)])
def test_an_old_bash(shell: BatchShell, version: str, refused: bool) -> None:
    text = (CHECKOUT / "slurm" / "common.sh").read_text().replace("BASH_VERSINFO[", "version[")
    (shell.directory / "common.sh").write_text(text)
    done = shell.try_to(f"version=({version}); . ./common.sh")
    assert done.returncode == (2 if refused else 0)
    assert ("slurm needs bash 4.4" in done.stderr) == refused
