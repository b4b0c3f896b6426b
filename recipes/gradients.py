"""How good each estimate of the gradient is: its noise, and where its mean points, on the shipped policy.

    python recipes/gradients.py --config recipes/reviews/rgrl.yaml --steps 16
    python recipes/gradients.py --config mine.yaml --only reinforce gradient --lora.path runs/mine/export/step_000100

Takes the gradient that one update would have, of each estimate, over and over at the same policy, each time with fresh
prompts, rollouts and noise; estimates of unguided rollouts share theirs. Of each it prints

    norm      of the long average, over all steps
    own       the cosine of a single step's gradient with the long average of the others of its kind
    noise     the variance of a single step's gradient over the squared norm of the long average
    true      the cosine of the long average with that of `trajectory`, the unbiased policy gradient

and below the table how far `true` can be trusted: the cosine of that average's two halves. KL terms are left out.
"""

import argparse
import json
import os
import sys
from dataclasses import replace

import torch
from accelerate import Accelerator
from torch import Tensor

from rgrl.algo import resolve_algorithm
from rgrl.config import ConfigError, load_config
from rgrl.metrics import Clock
from rgrl.setup import Run, load_readouts, set_up
from rgrl.step import Scored, gradient_term, objective_term, prepare, rollout_step

# Alike for all: rollouts whose trajectory can be evaluated exactly, and no KL.
COMMON = "--run.eval_steps 0 --objective.beta 0 --gradient.kl 0 --optim.updates 1"
EXACT = "--rollout.block_cache false --objective.advantage leave_one_out --lora.dropout 0 --guidance.kind none"
TERM = "--objective.weight 0 --gradient.weight 1"
ESTIMATES = {
    "trajectory": "--objective.name reinforce --objective.estimator trajectory",
    "reinforce": "--objective.name reinforce --objective.estimator one_step",
    "gradient": TERM,
    "gradient, late": f"{TERM} --gradient.states late",
    "gradient, w = 0": f"{TERM} --gradient.blend expectation",
    "gradient, w = 1": f"{TERM} --gradient.blend aps",
    "gradient, guided": f"{TERM} --guidance.kind entrgi",
}


def runs_of(path: str, names: list[str], more: list[str]) -> dict[str, Run]:
    """A run of each estimate, all with the same models."""
    words = [*more, *COMMON.split(), *EXACT.split()]
    base = set_up(load_config(path, [*words, "--gradient.weight", "1", "--guidance.kind", "entrgi"]), Accelerator())
    runs = {}
    for name in names:
        config = load_config(path, [*words, *ESTIMATES[name].split()])
        config = replace(config, lora=base.config.lora)
        algorithm = resolve_algorithm(config)
        readouts = load_readouts(config, algorithm)
        runs[name] = replace(base, config=config, algorithm=algorithm, readouts=readouts)
    return runs


def gradient(run: Run, scored: Scored, step: int) -> Tensor:
    """The flat gradient of one update's loss, with its sign turned: the direction of ascent."""
    make = objective_term if run.config.objective.weight > 0 else gradient_term
    term = make(run, prepare(run, scored, step), step, 0)
    return -term.gradient / term.totals["n"]


def measure(runs: dict[str, Run], steps: int) -> dict[str, Tensor]:
    """The gradients of each estimate, one a step: (steps, parameters)."""
    found: dict[str, list[Tensor]] = {name: [] for name in runs}
    for step in range(steps):
        rollouts: dict[str, Scored] = {}
        for name, run in runs.items():
            kind = run.config.guidance.kind
            if kind not in rollouts:
                rollouts[kind] = rollout_step(run, run.prompts(step), step, Clock())
            scored, config = rollouts[kind], run.config
            advantage_B = run.algorithm.advantage(
                scored.reward.total_B, config.rollout.num_generations, config.objective
            )
            found[name].append(gradient(run, replace(scored, advantage_B=advantage_B.to(run.policy.device)), step))
        print(f"step {step + 1} of {steps}", file=sys.stderr)
    return {name: torch.stack(gradients).double() for name, gradients in found.items()}


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()).clamp(min=1e-300))


def summary(found_SX: Tensor, true_X: Tensor | None) -> dict[str, float]:
    """What is printed of one estimate, from its gradients by step; `true_X` is the long average of `trajectory`."""
    S, mean_X = len(found_SX), found_SX.mean(0)
    others_SX = (found_SX.sum(0) - found_SX) / (S - 1)
    # The squared norm of an average holds its own noise: take that out.
    variance = float(found_SX.var(0).sum())
    signal = float(mean_X.square().sum()) - variance / S
    return {
        "norm": float(mean_X.norm()),
        "own": sum(cosine(g, rest) for g, rest in zip(found_SX, others_SX, strict=True)) / S,
        "noise": variance / signal if signal > 0 else float("inf"),
        "true": cosine(mean_X, true_X) if true_X is not None else float("nan"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--only", nargs="+", choices=ESTIMATES, metavar="ESTIMATE", help=", ".join(ESTIMATES))
    parser.add_argument("--json", metavar="FILE", help="write the table here too")
    args, more = parser.parse_known_args()
    try:
        if args.steps < 2:
            raise ConfigError(f"--steps must be 2 or more, not {args.steps}")
        if args.json and (os.path.exists(args.json) or not os.path.isdir(os.path.dirname(args.json) or ".")):
            raise ConfigError(f"--json {args.json} must be a new file in a folder that exists")
        found = measure(runs_of(args.config, args.only or list(ESTIMATES), more), args.steps)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    true_SX = found.get("trajectory")
    true_X = true_SX.mean(0) if true_SX is not None else None
    table = {name: summary(gradients, true_X) for name, gradients in found.items()}
    print(f"{'estimate':<28}{'norm':>9}{'own':>7}{'noise':>9}{'true':>7}")
    for name, row in table.items():
        print(f"{name:<28}{row['norm']:>9.4f}{row['own']:>7.2f}{row['noise']:>9.1f}{row['true']:>7.2f}")
    if true_SX is not None:
        halves = cosine(true_SX[::2].mean(0), true_SX[1::2].mean(0))
        print(f"cosine of the two halves of `trajectory`: {halves:.2f}, over {args.steps} steps")
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump({"config": args.config, "steps": args.steps, "table": table}, file, indent=2)


if __name__ == "__main__":
    main()
