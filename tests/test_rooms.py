"""Imports go down the list of rooms only, and the launcher's own process stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import dist_lm

PACKAGE = Path(dist_lm.__file__).parent
ROOMS = (
    ("launch", "__main__", "bench"),
    ("launcher",),
    ("train", "rank_program", "rank_data", "rank_result", "rank_start", "rlhf_run", "dry_run"),
    ("report",),
    ("cluster",),
    ("stages",),
    ("rlhf",),
    ("tool_evaluation",),
    ("generation",),
    ("training",),
    ("parallel",),
    ("model",),
    ("data",),
    ("tool_data",),
    ("tool_use",),
    ("chat",),
    ("tokenizer",),
    ("tracking",),
    ("interop",),
    (
        "config",
        "cluster_config",
        "config_file",
        "pool_config",
        "rlhf_run_config",
        "generate_config",
        "hardware_config",
        "reward_config",
        "stage_config",
        "rlhf_config",
        "syntax",
        "document",
        "run_directory",
        "run_lock",
        "errors",
        "durable",
        "entry_point",
        "imported",
        "json_lines",
        "lifeline",
        "__init__",
    ),
)
FLOOR = {name: depth for depth, names in enumerate(ROOMS) for name in names}
# what a room may use of a higher one: the nouns of the data room are values, known to those that make them
SHARED = {"dist_lm.document"}


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return {name for name in found if name == "dist_lm" or name.startswith("dist_lm.")}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_room_knows_no_room_above_it(path):
    own = room_of(".".join(("dist_lm", *path.relative_to(PACKAGE).with_suffix("").parts)))
    assert own in FLOOR, f"{own} is not in the list of rooms"
    for name in imports_of(path):
        if name == "dist_lm":
            continue
        other = room_of(name)
        assert FLOOR[other] >= FLOOR[own], f"{path.name} ({own}) imports {name} from above"


def test_the_launcher_starts_without_torch_ray_and_wandb():
    heavy = ("torch", "ray", "wandb")
    code = f"import sys, dist_lm.launch, dist_lm.__main__; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
