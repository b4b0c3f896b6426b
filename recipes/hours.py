"""How long a recipe of a real model takes, by arithmetic: nothing is loaded and nothing is run.

    python recipes/hours.py recipes/dream_7b/likelihood.yaml
    python recipes/hours.py recipes/llada_8b/gsm8k.yaml --tflops 250 --prompt 200

Counts the passes of a run as recipes/bench.py makes them (a rollout reads the policy once a step, guidance reads the
reward model forward and backward, an update reads the policy with its gradient, and the base where there is a KL), at
two operations a weight and token, and divides by a rate that is assumed. Left out: attention over the text itself,
sampling, the exchange between processes, the unpacking of 4-bit weights, loading. So it is a lower bound.
"""

import argparse
from dataclasses import dataclass

from rgrl.config import Config, load_config

TFLOPS = 400.0  # assumed, of one GPU: two fifths of what an H100 is said to do in bf16


@dataclass(frozen=True)
class Size:
    """A model: weights that each token passes, and its table's shape."""

    layers: float
    vocab: int
    width: int


SIZES = {
    "Dream-org/Dream-v0-Instruct-7B": Size(6.526e9, 152_064, 3584),
    "GSAI-ML/LLaDA-8B-Instruct": Size(6.980e9, 126_464, 4096),
    "dllm-hub/Qwen3-0.6B-diffusion-mdlm-v0.1": Size(0.4405e9, 151_936, 1024),
    "Skywork/Skywork-Reward-V2-Qwen3-0.6B": Size(0.4405e9, 151_936, 1024),
    "Skywork/Skywork-Reward-V2-Qwen3-1.7B": Size(1.4096e9, 151_936, 2048),
}


def forward(model: Size, tokens: float, projected: float = 0.0) -> float:
    """Operations of a forward pass over `tokens`, of which `projected` are scored over the vocabulary."""
    return 2 * model.layers * tokens + 2 * model.vocab * model.width * projected


def rollout(c: Config, rows: float, prompt: int, guided: float) -> float:
    """Operations of writing `rows` completions, of which the fraction `guided` is steered."""
    policy, C, T, block = SIZES[c.model.path], c.rollout.max_completion_length, c.rollout.steps, c.rollout.block_length
    hidden = (C + 1) / 2  # on average over the steps
    asked = min(hidden, (block + 1) / 2) if block else hidden
    tokens = prompt + C
    if (
        block and c.rollout.block_cache
    ):  # the text before a block is read once for each block, and the rest at each step
        steps, blocks = T / (C / block), C / block
        tokens = sum(prompt + C + (steps - 1) * (C - b * block) for b in range(int(blocks))) / T
    operations = T * rows * forward(policy, tokens, asked)
    if guided > 0:
        guide = SIZES[c.guidance.path or c.reward.path or ""]
        table = 2 * policy.vocab * guide.width * asked  # soft embeddings
        # Forward, and backward to the embeddings alone: the weights are frozen.
        operations += T / c.guidance.every * rows * guided * c.guidance.steps * 2 * (forward(guide, C) + table)
    return operations


def scores(c: Config, rows: float, prompt: int) -> float:
    """Operations of the reward model and of the judge on finished completions."""
    return sum(
        forward(SIZES[path], rows * (prompt + c.rollout.max_completion_length)) for path in [c.reward.path] if path
    )


def update(c: Config, rows: float, prompt: int) -> float:
    """Operations of all updates on one rollout."""
    policy, C = SIZES[c.model.path], c.rollout.max_completion_length
    whole = forward(policy, rows * (prompt + C), rows * C)
    learn = (3 if c.run.gradient_checkpointing else 2) * whole  # forward, backward, forward again
    operations = 0.0
    if c.objective.weight > 0:
        # The base, if there is a KL, and the policy before the first update, whose log-probabilities that update has.
        draws = c.optim.updates if c.objective.redraw else 1
        once = (c.objective.beta > 0) * draws * whole + (draws - 1) * whole
        operations += once + c.optim.updates * learn
    if c.gradient.weight > 0:
        guide = SIZES[c.guidance.path or c.reward.path or ""]
        each = learn + (c.gradient.kl > 0) * whole + 2 * forward(guide, rows * C)
        operations += c.optim.updates * c.gradient.draws * each
    return operations


def hours(c: Config, processes: int, prompt: int, tflops: float) -> dict[str, float]:
    """Hours of each part of a run on `processes` GPUs, and `all`."""
    rows = float(c.run.prompts_per_device * c.rollout.num_generations)
    guided = c.guidance.share if c.guidance.kind != "none" else 0.0
    parts = {
        "rollouts": c.run.steps * (rollout(c, rows, prompt, guided) + scores(c, rows, prompt)),
        "updates": c.run.steps * update(c, rows, prompt),
        "evaluations": 0.0,
    }
    if c.run.eval_steps:
        times, held_out = c.run.steps // c.run.eval_steps + 1, c.data.eval_prompts / processes
        probed = min(c.guidance.probe_prompts, c.data.eval_prompts) / processes if guided else 0.0
        once = rollout(c, held_out, prompt, 0.0) + scores(c, held_out, prompt)
        if c.judge.path:
            once += forward(SIZES[c.judge.path], held_out * (prompt + c.rollout.max_completion_length))
        parts["evaluations"] = times * (once + (rollout(c, probed, prompt, 1.0) if probed else 0.0))
    found = {name: operations / (tflops * 1e12) / 3600 for name, operations in parts.items()}
    return found | {"all": sum(found.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="one of dream_7b, llada_8b, qwen3_0p6b_a2d")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=100, help="tokens of a prompt, on average (100)")
    parser.add_argument("--tflops", type=float, default=TFLOPS, help=f"of one GPU, assumed ({TFLOPS:g})")
    args = parser.parse_args()
    for name, number in hours(load_config(args.recipe), args.processes, args.prompt, args.tflops).items():
        print(f"{name:<12}{number:8.2f} h")


if __name__ == "__main__":
    main()
