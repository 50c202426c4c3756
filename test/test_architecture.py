"""The floor plan: a room imports only rooms of a lower floor; what must be instant imports no torch."""

import ast
import subprocess
import sys

import pytest
from launching import ROOT

# A module's room is its longest prefix here. Inside floor 0 the order is a line: config_manager on top of the data.
FLOORS = {
    "torchtrain": 0.0,
    "torchtrain.utils": 0.0,
    "torchtrain.models.flavors": 0.1,
    "torchtrain.datasets.registry": 0.1,
    "torchtrain.pipeline_stages": 0.1,
    "torchtrain.logging_utils": 0.1,
    "torchtrain.ranks": 0.1,
    "torchtrain.config_manager": 0.2,
    "torchtrain.models": 1,
    "torchtrain.datasets": 1,
    "torchtrain.lr_scheduling": 1,
    "torchtrain.optimizer": 1,
    "torchtrain.loss": 1,
    "torchtrain.metrics": 1,
    "torchtrain.profiling": 1,
    "torchtrain.run_folder": 1,
    "torchtrain.checkpoint": 2,
    "torchtrain.parallelisms": 2,
    "torchtrain.validation": 2.1,
    "train": 3,
    "torchtrain.tools": 4,
}
INSTANT = (
    "torchtrain.utils",
    "torchtrain.models.flavors",
    "torchtrain.datasets.registry",
    "torchtrain.pipeline_stages",
    "torchtrain.config_manager",
)
LIMIT_CORE, LIMIT_FUNCTION = 5000, 80


def sources():
    return [ROOT / "train.py", *sorted((ROOT / "torchtrain").rglob("*.py"))]


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(module):
    parts = module.split(".")
    prefixes = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    if module == "torchtrain":
        return module
    return next((prefix for prefix in prefixes if prefix in FLOORS and prefix != "torchtrain"), None)


def imported_modules(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:  # `from package import module` names a module too
                whole = f"{node.module}.{alias.name}"
                yield whole if room(whole) != room(node.module) else node.module


def test_imports_go_down_the_floors():
    arrows = []
    for path in sources():
        here = room(module_name(path))
        assert here in FLOORS, f"{path} belongs to no room"
        for target in imported_modules(path):
            there = room(target)
            if there is not None and there != here and FLOORS[there] >= FLOORS[here]:
                arrows.append(f"{module_name(path)} imports {target}")
    assert not arrows


def test_an_arrow_going_up_is_seen():
    assert room("torchtrain.models.llama") == "torchtrain.models"
    assert room("torchtrain.models.flavors") == "torchtrain.models.flavors"
    assert FLOORS[room("torchtrain.checkpoint")] > FLOORS[room("torchtrain.models.llama")]


@pytest.mark.parametrize("module", INSTANT)
def test_instant_modules_import_no_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


@pytest.mark.parametrize("name", ["datasets", "tensorboard", "matplotlib", "tokenizers", "wandb"])
def test_heavy_packages_are_imported_where_used(name):
    for path in sources():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import):
                assert all(alias.name.split(".")[0] != name for alias in node.names), path
            elif isinstance(node, ast.ImportFrom):
                assert node.module.split(".")[0] != name, path


def code_lines(tree, text):
    strings = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            strings.update(range(node.lineno, node.end_lineno + 1))
    lines = enumerate(text.splitlines(), 1)
    return sum(1 for n, line in lines if line.strip() and not line.strip().startswith("#") and n not in strings)


def test_core_stays_small_enough_to_read():
    total = 0
    for path in sources():
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        if "tools" not in path.parts:
            total += code_lines(tree, text)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < LIMIT_FUNCTION, f"{path}: {node.name} is too long to read"
    assert total < LIMIT_CORE


def test_models_know_nothing_of_processes_environment_or_config():
    for path in (ROOT / "torchtrain" / "models").glob("*.py"):
        for target in imported_modules(path):
            assert not target.startswith(("torch.distributed", "torchtrain.config_manager", "os")), f"{path}: {target}"


def test_nothing_committed_names_this_machine_or_a_registry():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.split("\n"):
        path = ROOT / name
        if not name or path.suffix == ".model" or path == ROOT / "test" / "test_architecture.py":
            continue
        text = path.read_text(encoding="utf-8")
        for word in ("/work/", "../shared", "pypi.org", "files.pythonhosted", "/opt/"):
            assert word not in text, f"{name} contains {word!r}"
