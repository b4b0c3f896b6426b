"""How much of rgrl/ one training step runs through, and which way its imports point, against budgets.

    python tests/structure/path_of_a_step.py [--functions]

On the path is what `rollout_step` and `update_step` call in one step of a shipped recipe, directly or not, in rgrl/
alone. A function counts with all its lines, docstring and nested functions included, whatever part of it ran. Prints a
table for each recipe, and the imports between the layers of test_imports.py. Ends with 1 where a budget is exceeded, an
import points up, or imports run in a circle.
"""

import ast
import os
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from test_imports import LAYERS, between_parts, import_circles, upward_imports

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "rgrl"
LONGEST = 400  # lines of a file on the path
BUDGETS = {  # recipe -> most files, most lines of functions
    "recipes/reviews/rgrl.yaml": (18, 2000),  # guided rollouts, the reward's own gradient
    "recipes/reviews/reinforce.yaml": (19, 1300),  # unguided rollouts, a policy gradient
}
ONE_STEP = ["--run.steps", "1", "--run.eval_steps", "0", "--run.prompts_per_device", "2", "--tracking.wandb", "false"]


def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    """The functions and methods of a file, those inside of others left out."""

    def below(node: ast.AST) -> list:
        found = []
        for child in ast.iter_child_nodes(node):
            found += [child] if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) else below(child)
        return found

    return below(ast.parse(path.read_text("utf-8")))


def called_lines(recipe: str) -> dict[Path, set[int]]:
    """By file of rgrl/, the first lines of what one step of the recipe calls."""
    sys.path.insert(0, str(ROOT))
    from rgrl import trainer
    from rgrl.config import load_config

    found: dict[Path, set[int]] = defaultdict(set)

    def profile(frame, event, argument):
        if event == "call" and frame.f_code.co_filename.startswith(str(PACKAGE)):
            found[Path(frame.f_code.co_filename)].add(frame.f_code.co_firstlineno)

    def watched(function):
        def call(*args, **kwargs):
            sys.setprofile(profile)
            try:
                return function(*args, **kwargs)
            finally:
                sys.setprofile(None)

        return call

    halves = trainer.rollout_step, trainer.update_step
    trainer.rollout_step, trainer.update_step = map(watched, halves)
    try:
        with tempfile.TemporaryDirectory() as folder:
            trainer.train(load_config(ROOT / recipe, [*ONE_STEP, "--run.output_dir", f"{folder}/run"]))
    finally:
        trainer.rollout_step, trainer.update_step = halves
    return found


def path_of(recipe: str) -> dict[str, dict[str, int]]:
    """By file, and by function in it: its lines."""
    table: dict[str, dict[str, int]] = {}
    for path, lines in called_lines(recipe).items():
        counted = {}
        for function in functions(path):
            first = min([function.lineno, *(d.lineno for d in function.decorator_list)])
            if any(first <= line <= function.end_lineno for line in lines):
                counted[f"{function.name}:{function.lineno}"] = function.end_lineno - function.lineno + 1
        if counted:
            table[str(path.relative_to(ROOT))] = counted
    return table


def main() -> int:
    os.chdir(ROOT)
    os.environ.setdefault("WANDB_MODE", "offline")
    exceeded = []
    for recipe, (most_files, most_lines) in BUDGETS.items():
        table = path_of(recipe)
        files, lines = len(table), sum(sum(counted.values()) for counted in table.values())
        limits = f"at most {most_files} files and {most_lines:,} lines"
        print(f"\n{recipe}: {files} files, {lines:,} lines of functions ({limits})")
        print(f"{'lines of functions':>20}{'functions':>11}{'lines of the file':>19}")
        for name, counted in sorted(table.items(), key=lambda item: -sum(item[1].values())):
            whole = len((ROOT / name).read_text("utf-8").splitlines())
            print(f"{sum(counted.values()):>20}{len(counted):>11}{whole:>19}  {name}")
            if "--functions" in sys.argv:
                print("".join(f"{length:>26}  {function}\n" for function, length in counted.items()), end="")
            if whole > LONGEST:
                exceeded.append(f"{name} has {whole} lines, more than {LONGEST}")
        if files > most_files:
            exceeded.append(f"{recipe}: {files} files on the path, more than {most_files}")
        if lines > most_lines:
            exceeded.append(f"{recipe}: {lines} lines of functions on the path, more than {most_lines}")
    problems = upward_imports() + import_circles()
    print(f"\nimports between {len(set().union(*LAYERS))} parts: {len(between_parts())}, {len(problems)} of them wrong")
    exceeded += problems
    everything = [path.read_text("utf-8").count("\n") for path in PACKAGE.rglob("*.py")]
    print(f"\nrgrl/: {len(everything)} files, {sum(everything):,} lines")
    print("".join(f"exceeded: {problem}\n" for problem in exceeded), end="")
    return 1 if exceeded else 0


if __name__ == "__main__":
    sys.exit(main())
