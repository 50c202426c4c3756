"""The floor plan and the sizes: imports go down, files stay small, nothing is folded."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from helpers.launching import ROOT, TIMEOUT_S, environment, options

from torchtrain.tools.__main__ import COMMANDS

# A module's room is its longest prefix here. A room imports only rooms of a lower floor.
FLOORS = {
    "torchtrain": 0.0,
    "torchtrain.errors": 0.0,
    "torchtrain.imports": 0.0,
    "torchtrain.installation": 0.0,
    "torchtrain.launch_variables": 0.01,
    "torchtrain.utils": 0.01,
    "torchtrain.logging_utils": 0.02,
    "torchtrain.early_interrupt": 0.03,
    "torchtrain.orphans": 0.03,
    "torchtrain.attempts": 0.025,
    "torchtrain.open_files": 0.025,
    "torchtrain.devices": 0.025,
    "torchtrain.ranks": 0.03,
    "torchtrain.dtypes": 0.03,
    "torchtrain.shards": 0.03,
    "torchtrain.host_memory": 0.03,
    "torchtrain.hangs": 0.04,
    "torchtrain.step_metrics": 0.04,
    "torchtrain.stopping": 0.05,
    "torchtrain.catalog": 0.1,
    "torchtrain.config": 0.2,
    "torchtrain.config_manager": 0.3,
    "torchtrain.models": 1,
    "torchtrain.datasets": 1,
    "torchtrain.optimizers": 1,
    "torchtrain.lr_scheduling": 1,
    "torchtrain.loss": 1,
    "torchtrain.bf16_states": 0.9,
    "torchtrain.kernel_checks": 0.9,
    "torchtrain.log_files": 0.9,
    "torchtrain.metrics": 1,
    "torchtrain.profiling": 1,
    "torchtrain.run_folder": 1,
    "torchtrain.sampling": 1.1,
    "torchtrain.parallelisms": 2,
    "torchtrain.checkpoint": 2,
    "torchtrain.text_samples": 2,
    "torchtrain.bad_numbers": 2.1,
    "torchtrain.validation": 2,
    "torchtrain.watchdog": 2.1,
    "torchtrain.set_up": 3,
    "torchtrain.exporting": 2.1,
    "torchtrain.resuming": 3.05,
    "torchtrain.run_facts": 3.05,
    "torchtrain.needs": 2.2,
    "train": 3.1,
    "torchtrain.tools": 4,
}
INSTANT = (
    "torchtrain.errors",
    "torchtrain.imports",
    "torchtrain.launch_variables",
    "torchtrain.utils",
    "torchtrain.logging_utils",
    "torchtrain.early_interrupt",
    "torchtrain.orphans",
    "torchtrain.catalog",
    "torchtrain.config",
)
HEAVY = ("datasets", "tensorboard", "matplotlib", "tokenizers", "wandb", "torchao")

INNER = {
    "torchtrain.config_manager",
    "torchtrain.datasets.prepare",
    "torchtrain.tools",
    "torchtrain.tools.bench.products",
    "torchtrain.tools.bench.scale",
    "torchtrain.tools.config_reference",
    "torchtrain.tools.parity_ranks",
    "torchtrain.tools.standby",
}
"""Programs that a user starts under another name, or not at all."""

# Lines of code: blank lines, comments and docstrings do not count. What a reader has to keep in
# mind at once is bounded by the limits of spine, file and function, which do not move. The core and
# its folders grow by what a feature needs and by nothing else: who adds one raises the number in
# the same commit, where it is seen.
LIMIT_SPINE = 2000
LIMIT_FILE = 300
LIMIT_FUNCTION = 45
LIMIT_CORE = 12_999
FOLDER_LIMITS = {
    "config": 1_923,
    "datasets": 2_622,
    "parallelisms": 1800,
    "checkpoint": 1_316,
    "models": 800,
    "optimizers": 413,
}
# What a reader must read to know how training works.
SPINE = (
    "train.py",
    "torchtrain/models",
    "torchtrain/optimizers",
    "torchtrain/loss.py",
    "torchtrain/lr_scheduling.py",
    "torchtrain/parallelisms/apply.py",
    "torchtrain/parallelisms/fsdp.py",
    "torchtrain/parallelisms/initial_weights.py",
    "torchtrain/parallelisms/mesh.py",
    "torchtrain/datasets/loader.py",
)


def sources():
    return [ROOT / "train.py", *sorted((ROOT / "torchtrain").rglob("*.py"))]


@cache
def parsed(path):
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def nodes(path):
    return list(ast.walk(parsed(path)))


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(module):
    parts = module.split(".")
    prefixes = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    if module == "torchtrain":
        return module
    return next((name for name in prefixes if name in FLOORS and name != "torchtrain"), None)


def imported_modules(nodes_of_module):
    for node in nodes_of_module:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            for alias in node.names:  # `from package import module` names a module too
                whole = f"{node.module}.{alias.name}"
                yield whole if room(whole) != room(node.module) else node.module


def rising_arrows(modules):
    """The imports in `modules` (name to nodes of the syntax tree) that go up or sideways."""
    arrows = []
    for module, nodes_of_module in modules.items():
        here = room(module)
        assert here in FLOORS, f"{module} belongs to no room"
        for target in imported_modules(nodes_of_module):
            there = room(target)
            if there is not None and there != here and FLOORS[there] >= FLOORS[here]:
                arrows.append(f"{module} imports {target}")
    return arrows


def test_imports_go_down_the_floors():
    assert not rising_arrows({module_name(path): nodes(path) for path in sources()})


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("torchtrain.models.llama", "from torchtrain.parallelisms.fsdp import apply_fsdp"),
        ("torchtrain.config.schema", "import torchtrain.config_manager"),
        ("torchtrain.checkpoint.state", "from torchtrain.parallelisms import mesh"),
        ("torchtrain.set_up", "def f():\n    import train"),
    ],
)
def test_an_arrow_going_up_or_sideways_is_seen(module, line):
    assert len(rising_arrows({module: list(ast.walk(ast.parse(line)))})) == 1


def test_files_do_not_import_each_other_in_circles():
    names = {module_name(path): path for path in sources()}
    imports = {}
    for name, path in names.items():
        targets = set()
        for node in nodes(path):
            if isinstance(node, ast.ImportFrom):
                targets |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
            elif isinstance(node, ast.Import):
                targets |= {alias.name for alias in node.names}
        imports[name] = targets & names.keys() - {name}
    while leaves := [name for name, targets in imports.items() if not targets & imports.keys()]:
        for name in leaves:
            del imports[name]
    assert not imports, f"files in circles, or above one: {sorted(imports)}"


def instant_modules():
    return [name for name in map(module_name, sources()) if name.startswith(INSTANT)]


def test_instant_modules_import_no_torch():
    code = f"import sys, {', '.join(instant_modules())}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


AT_THE_END_OF_IMPORTS = """
import gc, runpy, sys
import torchtrain.imports

def report():
    print(gc.isenabled(), gc.get_stats()[2]["collections"], "torch" in sys.modules)
    print(*sys.modules)
    sys.exit()

torchtrain.imports.end_imports = report
program = sys.argv.pop(1)
runpy.run_path(program, run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "unneeded"),
    [
        ("train.py", HEAVY),
        (
            "torchtrain/tools/launch.py",
            (*HEAVY, "sympy", "torch._dynamo", "torch.distributed.tensor", "train"),
        ),
    ],
)
def test_a_start_imports_what_it_needs_and_collects_no_garbage_meanwhile(program, unneeded):
    command = [sys.executable, "-c", AT_THE_END_OF_IMPORTS, program, *options({})]
    printed = subprocess.check_output(
        command, cwd=ROOT, env=environment(1), text=True, timeout=TIMEOUT_S
    )
    collecting, imported = printed.splitlines()
    assert collecting == "False 0 True"
    assert not set(unneeded) & set(imported.split())


@pytest.mark.parametrize("name", HEAVY)
def test_heavy_packages_are_imported_where_used(name):
    for path in sources():
        for node in parsed(path).body:
            if isinstance(node, ast.Import):
                assert all(alias.name.split(".")[0] != name for alias in node.names), path
            elif isinstance(node, ast.ImportFrom):
                assert node.module.split(".")[0] != name, path


@cache
def numbers_of_code_lines(path):
    text = path.read_text(encoding="utf-8")
    strings = set()
    for node in nodes(path):
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            strings.update(range(node.lineno, node.end_lineno + 1))
    lines = enumerate(text.splitlines(), 1)
    return {
        n
        for n, line in lines
        if line.strip() and not line.strip().startswith("#") and n not in strings
    }


def code_lines(*paths):
    return sum(len(numbers_of_code_lines(path)) for path in paths)


def core():
    return [path for path in sources() if "tools" not in path.relative_to(ROOT).parts]


def test_the_core_and_the_spine_stay_small_enough_to_read():
    assert code_lines(*core()) < LIMIT_CORE
    spine = [path for path in core() if path.relative_to(ROOT).as_posix().startswith(SPINE)]
    assert len(spine) > len(SPINE)
    assert code_lines(*spine) < LIMIT_SPINE


@pytest.mark.parametrize("folder", FOLDER_LIMITS)
def test_a_folder_stays_under_its_limit(folder):
    assert code_lines(*(ROOT / "torchtrain" / folder).rglob("*.py")) <= FOLDER_LIMITS[folder]


def test_files_and_functions_stay_short():
    too_long = []
    for path in sources():
        code = numbers_of_code_lines(path)
        if len(code) > LIMIT_FILE and path in core():
            too_long.append(f"{path.name}: {len(code)} lines")
        for node in nodes(path):
            if isinstance(node, ast.FunctionDef):
                lines = code.intersection(range(node.lineno, node.end_lineno + 1))
                if len(lines) > LIMIT_FUNCTION:
                    too_long.append(f"{path.name}: {node.name} has {len(lines)} lines")
    assert not too_long


def splits_of_constants(nodes_of_module, methods=("split", "splitlines")):
    """Calls of `split()` on a literal, or on a constant by its upper-case name."""
    for node in nodes_of_module:
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        target = node.func.value
        while isinstance(target, ast.Subscript):
            target = target.value
        name = getattr(target, "id", getattr(target, "attr", ""))
        is_constant = isinstance(target, (ast.Constant, ast.JoinedStr)) or name.isupper()
        if node.func.attr in methods and is_constant:
            yield node.lineno


def test_no_constant_is_a_text_to_be_split():
    split = ast.parse('KEYS = "a b"\nfor key in KEYS.split(): pass')
    assert list(splits_of_constants(ast.walk(split)))
    for path in sources():
        assert not list(splits_of_constants(nodes(path))), path
    for path in (ROOT / "test").rglob("*.py"):
        if path != Path(__file__):
            assert not list(splits_of_constants(ast.walk(parsed(path)), methods=("split",))), path


def test_models_know_nothing_of_processes_environment_or_config():
    forbidden = ("torch.distributed", "torchtrain.config", "os")
    for path in (ROOT / "torchtrain" / "models").glob("*.py"):
        for target in imported_modules(nodes(path)):
            assert not target.startswith(forbidden), f"{path}: {target}"


def test_nothing_committed_names_this_machine_or_a_registry():
    command = ["git", "ls-files"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.split("\n"):
        path = ROOT / name
        if (
            not name
            or path.suffix in (".model", ".png")
            or path == Path(__file__)
            or not path.exists()
        ):
            continue
        text = path.read_text(encoding="utf-8")
        for word in ("/work/", "../shared", "pypi.org", "files.pythonhosted", "/opt/"):
            assert word not in text, f"{name} contains {word!r}"


def test_every_program_is_a_command_and_calls_itself_so():
    found = set()
    for path in sorted((ROOT / "torchtrain").rglob("*.py")):
        if '\nif __name__ == "__main__":' in path.read_text(encoding="utf-8"):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found.add(name.removesuffix(".__main__"))
    modules = {command.module: name for name, command in COMMANDS.items()}
    assert found == modules.keys() | INNER, "a program belongs in COMMANDS, or in INNER above"
    for module, name in modules.items():
        path = ROOT / module.replace(".", "/")
        source = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
        is_named = f'prog="torchtrain {name}"' in source.read_text(encoding="utf-8")
        assert is_named == (name != "train"), name


def test_each_test_file_has_a_name_of_its_own():
    names = [path.name for path in (ROOT / "test").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names)), "pytest imports two files of one name as one module"
