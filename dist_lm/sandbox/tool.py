"""Functions for `dist-lm generate --tools FILE`: the model runs code that it wrote, in a new sandbox for each call.

from dist_lm.sandbox.tool import run_bash, run_python, run_sql

TOOLS = [run_python]
"""

from dist_lm.sandbox.program import Limits, Program
from dist_lm.sandbox.sandbox import Sandbox

LIMITS = Limits(cpu_s=2.0, wall_s=8.0)  # shorter than a tool may take


def run_python(code: str) -> dict[str, str]:
    """Run a Python program and return what it prints. It has the standard library, and no network or files.

    Args:
        code: The program.
    """
    return _run("python", code)


def run_bash(code: str) -> dict[str, str]:
    """Run a Bash script and return what it prints. It has no network and an empty folder.

    Args:
        code: The script.
    """
    return _run("bash", code)


def run_sql(code: str) -> dict[str, str]:
    """Run SQL statements in an empty SQLite database and return the rows of the last query.

    Args:
        code: The statements.
    """
    return _run("sql", code)


def _run(language: str, code: str) -> dict[str, str]:
    """Runs a program and returns `output`, what it printed; if it failed, its `outcome` and the end of its output.

    Raises:
        RuntimeError: the sandbox failed.
        SandboxError: this machine has no sandbox.
    """
    with Sandbox() as sandbox:
        verdict = sandbox.run(Program(language, code), LIMITS)
    if not verdict.judged:
        raise RuntimeError(verdict.output)
    if verdict.outcome == "passed":
        return {"output": verdict.stdout[0]}
    return {"outcome": verdict.outcome, "output": verdict.output}
