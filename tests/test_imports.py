"""Imports go down the list of packages only, and the launcher's own process stays light."""

import ast
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

import dist_lm
from dist_lm.stages.registry import OWN
from tests.patience import patient

ROOT = Path(dist_lm.__file__).parent
STAGES = {*OWN} - {"generate", "tokenizer"}  # these two are also a verb and an artefact
PACKAGES = (
    ("demo",),  # named from conf by import path
    ("launch", "__main__", "verbs", "bench", "gpu_check"),
    ("launcher",),
    ("server",),
    ("report",),
    ("train",),
    ("prepare",),
    ("dry_run",),
    ("stages",),
    ("rlhf",),
    ("environments",),
    ("cluster",),
    ("evaluation",),
    ("generation",),
    ("training",),
    ("parallel",),
    ("model",),
    ("data",),
    ("tools",),
    ("chat",),
    ("interop",),
    ("tokenizer",),
    ("sandbox",),
    ("tracking",),
    ("config",),
    ("storage",),
    ("errors", "document", "__init__"),
)
LEVEL = {name: depth for depth, names in enumerate(PACKAGES) for name in names}


def package_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports_of(path: Path, for_types: bool = True) -> set[str]:
    """Names of dist_lm that a file imports anywhere, also inside functions.

    Args:
        for_types: with what only type checkers import (`if TYPE_CHECKING:`).
    """
    names: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and not for_types:
            return
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
            names.add(node.module)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return {name for name in names if name == "dist_lm" or name.startswith("dist_lm.")}


def module_of(path: Path) -> str:
    parts = ("dist_lm", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def cycles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of nodes that lead to each other (Tarjan's strongly connected components of two or more nodes)."""
    number: dict[str, int] = {}
    lowest: dict[str, int] = {}
    path: list[str] = []
    groups: list[list[str]] = []

    def visit(node: str) -> None:
        number[node] = lowest[node] = len(number)
        path.append(node)
        for other in graph[node]:
            if other not in number:
                visit(other)
                lowest[node] = min(lowest[node], lowest[other])
            elif other in path:
                lowest[node] = min(lowest[node], number[other])
        if lowest[node] == number[node]:
            group = path[path.index(node) :]
            del path[path.index(node) :]
            if len(group) > 1:
                groups.append(sorted(group))

    for node in graph:
        if node not in number:
            visit(node)
    return sorted(groups)


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_package_knows_no_package_above_it(path):
    own = package_of(".".join(("dist_lm", *path.relative_to(ROOT).with_suffix("").parts)))
    assert own in LEVEL, f"{own} is not in the list of packages"
    for name in imports_of(path):
        if name == "dist_lm":
            continue
        other = package_of(name)
        assert LEVEL[other] >= LEVEL[own], f"{path.name} ({own}) imports {name} from above"


def test_no_file_and_no_package_imports_itself_on_a_detour():
    """A reader can begin with any file and read down. What only type checkers import is no detour."""
    paths = {module_of(path): path for path in ROOT.rglob("*.py")}
    files = {module: imports_of(path, for_types=False) & paths.keys() - {module} for module, path in paths.items()}
    assert cycles(files) == []
    packages: dict[str, set[str]] = {package_of(module): set() for module in paths}
    for module, imported in files.items():
        packages[package_of(module)] |= {package_of(name) for name in imported} - {package_of(module)}
    assert cycles(packages) == []


def test_a_cycle_is_found():
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}) == [["b", "c"]]


def test_the_launcher_starts_without_torch_ray_and_wandb():
    heavy = ("torch", "ray", "wandb")
    code = f"import sys, dist_lm.launch, dist_lm.__main__; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=patient(240)
    )
    assert done.stdout.strip() == "[]"


def test_a_process_that_generates_on_a_cpu_does_not_import_the_compiler():
    """It takes 2 s. Only the attention kernel of CUDA needs it; a model that trains uses the compiler anyway."""
    code = """
import sys, torch, dist_lm.cluster.pool_actor, dist_lm.generation.terminal
from dist_lm.config.model import ModelConfig
from dist_lm.generation.engine import Engine
from dist_lm.generation.request import Request
from dist_lm.model.size import parameter_shapes
config = ModelConfig(name="small", d_model=32, n_layers=1, n_heads=2, d_ff=64, max_seq_len=64, vocab_size=64)
engine = Engine(config, {name: torch.randn(shape) for name, shape in parameter_shapes(config).items()}, eot_id=0)
engine.submit(Request("one", [1, 2]))
print(len(engine.run()), "torch._dynamo" in sys.modules)
import dist_lm.model.transformer
print("torch.nn.attention.varlen" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=patient(120)
    )
    assert done.stdout.split() == ["1", "False", "False"]


def test_at_the_root_are_the_entry_points_and_what_all_packages_share():
    found = {path.stem for path in ROOT.glob("*.py")}
    assert found == {"__init__", "__main__", "launch", "train", "errors", "document"}


@pytest.mark.parametrize(
    "path",
    [ROOT / "launch.py", *sorted((ROOT / "launcher").glob("*.py")), *sorted((ROOT / "prepare").glob("*.py"))],
    ids=lambda p: p.name,
)
def test_the_launcher_knows_no_stage(path):
    """Neither a stage's name nor its class: what differs between stages is asked of the stage."""
    for node in ast.walk(ast.parse(path.read_text())):
        assert not (isinstance(node, ast.Constant) and node.value in STAGES), (path.name, node.lineno)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
            asked = ast.unparse(node.args[1])
            assert "Stage" not in asked, (path.name, node.lineno)
            assert not asked.endswith("Config") or asked == "Config", (path.name, node.lineno)
