"""Runs programs in a sandbox of another process, for a user that is not root: one JSON object a line, and back."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from dist_lm.sandbox.program import Limits, Program, Test, Verdict
from dist_lm.sandbox.sandbox import Sandbox

USER = 54_321
ROOT = Path(__file__).parents[2]

OPEN_FOLDERS = """
set -eu
i=0
for private in $PRIVATE; do
  for wanted in $WANTED; do
    case $wanted in $private/*) i=$((i + 1)); mkdir "$PLACE/$i"; mount --rbind "$wanted" "$PLACE/$i" ;; esac
  done
  mount -t tmpfs -o mode=755 tmpfs "$private"
  j=$((i - $(for wanted in $WANTED; do case $wanted in $private/*) echo x ;; esac; done | wc -l)))
  for wanted in $WANTED; do
    case $wanted in $private/*) j=$((j + 1)); mkdir -p "$wanted"; mount --rbind "$PLACE/$j" "$wanted" ;; esac
  done
done
exec setpriv --reuid "$ID" --regid "$ID" --clear-groups "$@"
"""
"""In mount namespace of its own: folders that only root may enter let everybody pass to what the test needs."""


def user_process(place: Path) -> subprocess.Popen:
    """This module as a process of `USER`; needs root."""
    wanted = list(dict.fromkeys(str(Path(path).resolve()) for path in (sys.base_prefix, sys.prefix, ROOT)))
    parents = {parent for path in wanted for parent in Path(path).parents if str(parent) != "/"}
    private = sorted(str(path) for path in parents if path.stat().st_mode & 0o005 != 0o005)
    private = [path for path in private if not any(path.startswith(f"{other}/") for other in private)]
    return subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", OPEN_FOLDERS, "sh", sys.executable, "-m", "tests.sandbox.as_user"],
        env={
            **os.environ,
            "PRIVATE": " ".join(private),
            "WANTED": " ".join(wanted),
            "PLACE": str(place),
            "ID": str(USER),
            "PYTHONPATH": str(ROOT),
            "PYTHONDONTWRITEBYTECODE": "1",
            "TMPDIR": "/tmp",
        },
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def ask(process: subprocess.Popen, program: Program, limits: Limits) -> Verdict:
    assert process.stdin
    assert process.stdout
    process.stdin.write(json.dumps([asdict(program), asdict(limits)]) + "\n")
    process.stdin.flush()
    values = json.loads(process.stdout.readline())
    return Verdict(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def main() -> None:
    assert os.getuid() == USER
    with Sandbox() as sandbox:
        for line in sys.stdin:
            program, limits = json.loads(line)
            tests = tuple(Test(**test) for test in program.pop("tests"))
            verdict = sandbox.run(Program(**program, tests=tests), Limits(**limits))
            print(json.dumps(asdict(verdict)), flush=True)


if __name__ == "__main__":
    main()
