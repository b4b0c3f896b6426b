"""Layout: imports point downward only, few modules know accelerate, and the core stands without data and tracking."""

import ast
import subprocess
import sys
from pathlib import Path

import rgrl

ROOT = Path(rgrl.__file__).parent
# The design's table, lowest layer first. A module may import from its own layer and from those below.
LAYERS = [
    {"config", "types", "seeds"},
    {
        "models",
        "rewards",
        "data",
        "tracking",
        "guidance",
        "corrections",
        "sampling",
        "denoise",
        "advantages",
        "launch",
        "logprobs",
        "objectives",
    },
    {"checkpoint", "evaluation", "metrics", "parts", "report", "stopping"},
    {"step"},
    {"trainer"},
    {"cli"},
]
# Plain torch: models and rewards arrive as arguments.
PURE = {"corrections", "guidance", "sampling", "denoise", "advantages", "logprobs", "objectives"}
MAY_ACCELERATE = {"checkpoint", "evaluation", "metrics", "parts", "step", "tracking", "trainer"}


def part_of(module):
    """rgrl.models.policy -> models; None for the package itself and for anything else."""
    names = module.split(".")
    return names[1] if names[0] == "rgrl" and len(names) > 1 else None


def imports():
    """(file, its part of rgrl, full name of a module that it imports anywhere, also inside functions)."""
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        names = ("rgrl", *path.relative_to(ROOT).with_suffix("").parts)
        part = part_of(".".join(names))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found += [(path, part, alias.name) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = ".".join(names[: len(names) - node.level]) if node.level else ""
                module = ".".join(filter(None, [base, node.module]))
                # `from rgrl import denoise` imports a module too.
                found += [(path, part, f"{module}.{a.name}" if module == "rgrl" else module) for a in node.names]
    return found


def layer(part):
    return next(i for i, names in enumerate(LAYERS) if part in names)


def test_every_module_has_a_place_in_the_table():
    parts = {
        p.stem if p.is_file() else p.name for p in ROOT.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()
    }
    assert parts - {"__init__"} == set().union(*LAYERS)


def test_imports_point_downward():
    wrong = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path, part, module in imports()
        if part not in (None, "__init__")
        and (target := part_of(module)) not in (None, part)
        and layer(target) > layer(part)
    ]
    assert not wrong
    assert len([1 for _, _, module in imports() if part_of(module)]) > 30  # the search finds imports at all


def test_no_circles_within_a_layer():
    edges = {}
    for _, part, module in imports():
        if part not in (None, "__init__") and part_of(module) not in (None, part):
            edges.setdefault(part, set()).add(part_of(module))

    def reaches(start, goal, seen):
        for following in edges.get(start, ()):
            if following == goal or (following not in seen and reaches(following, goal, seen | {following})):
                return True
        return False

    assert not [part for part in edges if reaches(part, part, set())]


def test_what_is_plain_torch_imports_nothing_else():
    allowed = {"torch", "rgrl", "collections", "dataclasses", "math", "typing"}
    wrong = [(path.name, m) for path, part, m in imports() if part in PURE and m.split(".")[0] not in allowed]
    assert not wrong
    into = {part_of(module) for _, part, module in imports() if part in PURE and part_of(module)}
    assert into <= PURE | LAYERS[0]


def test_few_modules_know_accelerate():
    users = {part for _, part, module in imports() if module.split(".")[0] == "accelerate"}
    assert users <= MAY_ACCELERATE
    assert "trainer" in users


def test_no_remote_code_is_ever_trusted():
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not (isinstance(node, ast.keyword) and node.arg == "trust_remote_code"), path


def test_core_imports_without_datasets_and_wandb():
    modules = [".".join(("rgrl", *p.relative_to(ROOT).with_suffix("").parts)) for p in sorted(ROOT.rglob("*.py"))]
    modules = [m.removesuffix(".__init__") for m in modules]
    code = f"""
import importlib, sys

class Hidden:
    # Stands before each finder and knows nothing of two packages, as if they were not installed.
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
for name in {modules!r}:
    importlib.import_module(name)
assert "rgrl.trainer" in sys.modules and not {{"datasets", "wandb"}} & set(sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
