"""What each approximation of a rollout costs in reward and saves in time, on the reviews recipe's untrained policy.

    python recipes/reviews/price.py
    python recipes/reviews/price.py --seeds 3 --rounds 3

Every variant writes completions of the same held-out prompts with the same random numbers; the interval is over
prompts and seeds. A step is one rollout and one update on the recipe's training prompts, the variants in turn.
"""

import argparse
import statistics
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator

from rgrl.config import load_config
from rgrl.data import PromptStream
from rgrl.evaluation.guards import distinct
from rgrl.metrics import Clock
from rgrl.setup import Run, set_up
from rgrl.step import roll_out, rollout_step, update_step

RECIPE = Path(__file__).with_name("base.yaml")
# Guided and exact, whatever the recipe says; the rate is so low that the updates leave the policy what it is.
PLAIN = (
    "--guidance.kind entrgi --guidance.share 1 --rollout.block_length 0 --optim.updates 1 --optim.learning_rate 1e-12"
).split()
VARIANTS = {
    "exact": [],
    "unguided": ["--guidance.kind", "none"],
    "guidance.every 2": ["--guidance.every", "2"],
    "guidance.every 4": ["--guidance.every", "4"],
    "guidance.top_n 50": ["--guidance.top_n", "50"],
    "guidance.top_n 10": ["--guidance.top_n", "10"],
    "rollout.commit_above 0.9": ["--rollout.commit_above", "0.9"],
    "rollout.commit_above 0.6": ["--rollout.commit_above", "0.6"],
    "rollout.block_length 10": ["--rollout.block_length", "10"],
    "rollout.block_length 5": ["--rollout.block_length", "5"],
    "rollout.block_length 10, no cache": ["--rollout.block_length", "10", "--rollout.block_cache", "false"],
    "rollout.block_length 5, no cache": ["--rollout.block_length", "5", "--rollout.block_cache", "false"],
}


def seconds(run: Run) -> float:
    """One training step; the learning rate is so small that the policy stays what it is."""
    clock = Clock()
    scored = rollout_step(run, run.prompts(0), 0, clock)
    update_step(run, scored, 0, 0, clock)
    return sum(clock.seconds.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="variants instead of all")
    args = parser.parse_args()
    variants = {
        name: load_config(RECIPE, [*PLAIN, *overrides])
        for name, overrides in VARIANTS.items()
        if name in {*args.only, "unguided"}  # which the others are compared with
    }
    run = set_up(load_config(RECIPE, PLAIN), Accelerator(cpu=True))
    assert run.eval_prompts is not None and run.judge is not None
    taken: dict[str, list[float]] = {name: [] for name in variants}
    for round_ in range(args.rounds + 1):
        for name, config in variants.items():
            stream = PromptStream(run.stream.prompts, round_, config.run.prompts_per_device, 1)
            spent = seconds(replace(run, config=config, stream=stream))
            if round_ > 0:  # the first round warms up
                taken[name].append(spent)
    print(f"{'variant':<26}{'step, x unguided':>18}{'reward':>16}{'judge':>8}{'distinct_2':>12}")
    for name, config in variants.items():
        reward, judge, texts = [], [], []
        for seed in range(args.seeds):
            config.run.seed = seed
            scored = roll_out(replace(run, config=config), run.eval_prompts, config.guidance, 0, "price", Clock())
            reward += scored.reward.total_B.tolist()
            judge += run.judge.score(scored.prompts, scored.completions).reward_B.tolist()
            texts.append(distinct(scored.completions, 2))
        ratio = statistics.median(a / b for a, b in zip(taken[name], taken["unguided"], strict=True))
        mean = torch.tensor(reward).mean().item()
        half = 1.96 * torch.tensor(reward).std().item() / len(reward) ** 0.5
        print(
            f"{name:<26}{ratio:>18.2f}{mean:>9.2f} ± {half:.2f}{statistics.mean(judge):>8.2f}"
            f"{statistics.mean(texts):>12.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
