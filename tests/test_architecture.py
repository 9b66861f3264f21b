"""The house rules that an import or a call can break, read from the source with ast.

Arrows point downwards only: `sanctl_ops` <- `sanctl_models` <- `sanctl`, and inside `sanctl`
errors <- config <- data, report <- engine, bench <- cli.
"""

import ast
import graphlib
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {
    "sanctl": ROOT / "sanctl",
    "sanctl_models": ROOT / "sanctl_models",
    "sanctl_ops": ROOT / "ops" / "sanctl_ops",
    "sanctl_templates": ROOT / "templates",
}
LEVELS = [
    {"sanctl_ops"},
    {"sanctl_models", "sanctl_templates"},
    {"sanctl", "sanctl.errors"},
    {"sanctl.config"},
    {"sanctl.data", "sanctl.report"},
    {"sanctl.engine", "sanctl.bench"},
    {"sanctl.cli"},
    {"sanctl.__main__"},
]
"""A layer may import itself and those on the levels above its own line; no other."""
LEVEL_OF = {layer: level for level, layers in enumerate(LEVELS) for layer in layers}
HEAVY = {"torch", "torchvision", "cv2", "pandas", "matplotlib", "numpy", "tensorboardX", "cupy"}
PICKLES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "shelve", "joblib", "marshal"}


@cache
def modules() -> dict[str, Path]:
    """Every module of the project by its import name."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            found[".".join((package, *parts))] = path
    return found


@cache
def tree_of(module: str) -> ast.Module:
    path = modules()[module]
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def libraries_in(nodes: Iterator[ast.AST], module: str) -> set[str]:
    """The top-level packages that these nodes of a module import."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(absolute_source(node, module).partition(".")[0])
    return found


def absolute_source(node: ast.ImportFrom, module: str) -> str:
    if not node.level:
        return node.module or ""
    is_package = modules()[module].name == "__init__.py"
    parts = module.split(".")
    base = parts[: len(parts) - node.level + is_package]
    return ".".join([*base, *([node.module] if node.module else [])])


def own_imports(module: str) -> set[str]:
    """The project's modules that a module imports, wherever in it the import stands."""
    found: set[str] = set()
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            source = absolute_source(node, module)
            members = {f"{source}.{alias.name}" for alias in node.names}
            found |= {member if member in modules() else source for member in members}
    return found & modules().keys()


def layer_of(module: str) -> str:
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "sanctl" and len(parts) > 1 else parts[0]


def at_module_level(module: str) -> Iterator[ast.AST]:
    """The nodes that run on import: not those in functions or under `if TYPE_CHECKING`."""
    waiting: list[ast.AST] = [tree_of(module)]
    while waiting:
        node = waiting.pop()
        yield node
        for child in ast.iter_child_nodes(node):
            is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            typing_only = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            if not is_function and not typing_only:
                waiting.append(child)


def test_every_module_belongs_to_a_known_layer() -> None:
    assert len(modules()) > 20
    assert {layer_of(module) for module in modules()} <= LEVEL_OF.keys()


def test_arrows_point_downwards() -> None:
    wrong = [
        f"{module} imports {name}"
        for module in modules()
        for name in own_imports(module)
        if layer_of(name) != layer_of(module)
        and LEVEL_OF[layer_of(name)] >= LEVEL_OF[layer_of(module)]
    ]
    assert wrong == []


def test_no_circle_between_modules() -> None:
    graph = {module: own_imports(module) for module in modules()}
    assert sum(map(len, graph.values())) > 20
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"circle: {' -> '.join(error.args[1])}")


def test_commands_import_heavy_libraries_only_when_they_run() -> None:
    wrong = [
        f"{module} imports {name}"
        for module in modules()
        if layer_of(module) == "sanctl.cli"
        for name in libraries_in(at_module_level(module), module) & HEAVY
    ]
    assert wrong == []


EVERY_HELP = """
import contextlib, io, json, sys
import typer
from sanctl.cli.main import app

def commands(command, path):
    yield path
    for name, child in getattr(command, "commands", {}).items():
        yield from commands(child, [*path, name])

seen = list(commands(typer.main.get_command(app), []))
for path in seen:
    with contextlib.redirect_stdout(io.StringIO()) as text:
        app([*path, "--help"], standalone_mode=False)
    assert "Usage" in text.getvalue(), path
print(json.dumps({"commands": seen, "modules": sorted(sys.modules)}))
"""


def test_help_of_every_command_imports_no_heavy_library() -> None:
    done = subprocess.run(
        [sys.executable, "-c", EVERY_HELP], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert ["dataset", "index"] in answer["commands"]
    assert ["train"] in answer["commands"]
    assert HEAVY & set(answer["modules"]) == set()


def test_only_report_and_cli_print() -> None:
    wrong = []
    for module in modules():
        if layer_of(module) in {"sanctl.report", "sanctl.cli"}:
            continue
        for node in ast.walk(tree_of(module)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "print":
                wrong.append(f"{module}:{node.lineno} prints")
            if isinstance(node, ast.Attribute) and ast.unparse(node) in {
                "sys.stdout",
                "sys.stderr",
            }:
                wrong.append(f"{module}:{node.lineno} uses {ast.unparse(node)}")
        libraries = libraries_in(ast.walk(tree_of(module)), module)
        wrong += [f"{module} imports {name}" for name in libraries & {"rich", "typer"}]
    assert wrong == []


def test_every_torch_load_reads_weights_only() -> None:
    wrong, seen = [], 0
    for module in modules():
        for node in ast.walk(tree_of(module)):
            if isinstance(node, ast.ImportFrom) and node.module == "torch":
                wrong += [f"{module} imports torch.load" for a in node.names if a.name == "load"]
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                seen += 1
                safe = {k.arg: ast.unparse(k.value) for k in node.keywords}.get("weights_only")
                if safe != "True":
                    wrong.append(f"{module}:{node.lineno}")
    assert wrong == []
    assert seen > 0


def test_nothing_is_unpickled_but_by_the_reader_of_old_packs() -> None:
    users = {
        module for module in modules() if libraries_in(ast.walk(tree_of(module)), module) & PICKLES
    }
    assert users <= {"sanctl.data.legacy"}
    unsafe = {
        "allow_pickle",
        "read_pickle",
        "unsafe_load",
        "full_load",
        "UnsafeLoader",
        "FullLoader",
    }
    wrong = [
        f"{module}: {name}"
        for module in modules()
        for node in ast.walk(tree_of(module))
        for name in [getattr(node, "attr", None) or getattr(node, "arg", None)]
        if name in unsafe
    ]
    assert wrong == []
