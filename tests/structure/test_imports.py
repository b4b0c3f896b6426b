"""The structure of rgrl/: imports point down, the core is plain torch, accelerate stays out."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import rgrl

ROOT = Path(rgrl.__file__).parent
# Lowest layer first, as in docs/architecture.md. A part may import from its own layer and from those below. A folder
# has a layer to itself.
LAYERS = [
    {"errors"},
    {"config"},
    {"types", "seeds", "plugins", "hub", "console", "environment", "folder"},
    {"models"},
    {"rollout"},
    {"algo"},
    {"rewards"},
    {"data"},
    {"tracking"},
    {"runtime"},
    {"distributed", "metrics"},
    {"checkpoint"},
    {"evaluation"},
    {"export"},
    {"setup"},
    {"step", "header"},
    {"trial"},
    {"trainer"},
    {"doctor"},
    {"cli"},
    {"__main__"},
]
PURE = {"rollout", "algo"}  # models and rewards arrive as arguments; nothing but torch
PURE_MAY_USE = PURE | {"models", "types", "config", "errors", "plugins", "seeds"}
MAY_ACCELERATE = {"runtime", "distributed", "metrics", "checkpoint", "evaluation", "setup", "step", "header", "trainer"}


def part_of(module):
    """rgrl.models.policy -> models; None for the package itself and for anything else."""
    names = module.split(".")
    return names[1] if names[0] == "rgrl" and len(names) > 1 else None


@cache
def trees():
    """The syntax tree of every module."""
    names = {path: ".".join(("rgrl", *path.relative_to(ROOT).with_suffix("").parts)) for path in ROOT.rglob("*.py")}
    return {name.removesuffix(".__init__"): ast.parse(path.read_text("utf-8")) for path, name in names.items()}


def nodes(tree):
    """Every node, but for imports that only type checkers follow."""
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            yield node
            yield from nodes(node)


def imports():
    """(module, full name of a module that it imports anywhere, also inside functions)."""
    for module, tree in trees().items():
        for node in nodes(tree):
            if isinstance(node, ast.Import):
                yield from ((module, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{module} imports relatively"
                # `from rgrl import denoise` imports a module too.
                whole = [f"rgrl.{alias.name}" for alias in node.names] if node.module == "rgrl" else [node.module]
                yield from ((module, name) for name in whole)


@cache
def between_parts():
    """(part, another part of rgrl that it imports)."""
    pairs = {(part_of(module), part_of(imported)) for module, imported in imports()}
    return {(a, b) for a, b in pairs if a is not None and b is not None and a != b}


def layer(part):
    return next(i for i, names in enumerate(LAYERS) if part in names)


def test_every_module_has_a_place_in_the_table():
    assert {part_of(module) for module in trees()} - {None} == set().union(*LAYERS)


def test_a_folder_has_a_layer_to_itself():
    folders = {path.name for path in ROOT.iterdir() if (path / "__init__.py").exists()}
    assert len(folders) >= 9 and all(names == {name} for names in LAYERS for name in names & folders)


def upward_imports():
    return [f"{a} imports {b}, which is above it" for a, b in sorted(between_parts()) if layer(b) > layer(a)]


def import_circles():
    def reaches(start, goal, seen):
        following = [b for a, b in between_parts() if a == start]
        return goal in following or any(b not in seen and reaches(b, goal, seen | {b}) for b in following)

    return [f"{part} imports itself, by way of others" for part in set().union(*LAYERS) if reaches(part, part, {part})]


def test_imports_point_down():
    assert not upward_imports()
    assert len(between_parts()) > 30  # the search finds imports at all


def test_no_import_circles():
    assert not import_circles()


def test_the_core_is_plain_torch():
    allowed = {"torch", "rgrl", *sys.stdlib_module_names}
    assert not [(a, b) for a, b in imports() if part_of(a) in PURE and b.split(".")[0] not in allowed]
    assert {b for a, b in between_parts() if a in PURE} <= PURE_MAY_USE
    assert {b for a, b in between_parts() if a == "config"} == {"errors"}


def test_few_modules_know_accelerate():
    users = {part_of(module) for module, imported in imports() if imported.split(".")[0] == "accelerate"}
    assert users <= MAY_ACCELERATE
    assert "trainer" in users


def test_no_remote_code_is_ever_trusted():
    """Left out, transformers asks on the terminal, and runs what a checkpoint brings along on a `y`."""
    asked = 0
    for module, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert isinstance(node.value, ast.Constant) and node.value.value is False, module
            if isinstance(node, ast.Call) and re.fullmatch(
                r"Auto\w+\.from_(pretrained|config)", ast.unparse(node.func)
            ):
                assert "trust_remote_code" in {keyword.arg for keyword in node.keywords}, f"{module}: {node.lineno}"
                asked += 1
    assert asked >= 3


def run(code):
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]


def test_settings_and_the_package_itself_import_without_torch():
    run("import sys, rgrl, rgrl.config; assert not {'torch', 'transformers', 'accelerate'} & set(sys.modules)")


def test_the_command_line_itself_imports_next_to_nothing():
    run("import sys, rgrl.cli; assert not {'torch', 'transformers', 'pydantic', 'pyarrow'} & set(sys.modules)")


@pytest.mark.slow
def test_core_imports_without_datasets_and_wandb():
    code = f"""
import importlib, sys

class Hidden:
    # Wraps a finder and hides two packages, as if they were not installed.
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in ("datasets", "wandb") else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Hidden(finder) for finder in sys.meta_path]
for name in ("datasets", "wandb"):
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        continue
    sys.exit(name + " could still be imported")
for name in {sorted(trees())!r}:
    importlib.import_module(name)
assert "rgrl.trainer" in sys.modules and not {{"datasets", "wandb"}} & set(sys.modules)
"""
    run(code)
