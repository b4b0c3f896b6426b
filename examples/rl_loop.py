"""A whole guided RL run in one file, from rgrl's public parts: no trainer, no settings file, nothing hidden.

    python examples/rl_loop.py --steps 12

A small diffusion LM that ships with the repository continues the opening of a film review. The gradient of a reward
model steers half of its completions (EntRGi, arXiv 2602.05000), and a group-relative policy gradient with a KL to the
frozen base (d1, arXiv 2504.12216) trains a LoRA adapter on all of them. It computes what the trainer does:

    rgrl train --config recipes/reviews/reinforce.yaml --guidance.kind entrgi --guidance.share 0.5

to the last bit; tests/golden compares them. Replace what you want to change. Names end in the shape of their tensor:
B rows (prompts times completions), L canvas length, C completion length.
"""

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from rgrl.algo.advantages import zscore
from rgrl.algo.estimators import ESTIMATORS, only_logp
from rgrl.algo.objectives import OBJECTIVES
from rgrl.config import GuidanceConfig, LoraConfig, ModelConfig, ObjectiveConfig, RolloutConfig
from rgrl.data import PromptStream
from rgrl.models import Policy, add_lora, load_policy
from rgrl.models.lora import adapter_parameters
from rgrl.rewards import ClassifierReward, load_classifier
from rgrl.rollout import Guidance, generate
from rgrl.seeds import generators
from rgrl.types import LossInputs, Prompts, Rollout

REVIEWS = Path(__file__).resolve().parents[1] / "recipes" / "reviews"
SEED = 0
P, G = 6, 4  # prompts a step, completions of each
GUIDED = G // 2  # of each group
LEARNING_RATE, WARMUP, MAX_GRAD_NORM = 4e-4, 5, 1.0

ROLLOUT = RolloutConfig(num_generations=G, max_completion_length=20, steps=20, temperature=0.8, block_length=10)
GUIDANCE = GuidanceConfig(kind="entrgi")
OBJECTIVE = ObjectiveConfig(name="reinforce", estimator="one_step", beta=0.075, prompt_mask=0.15)


def main(steps: int, output: Path | None = None) -> list[dict[str, float]]:
    """Train for so many steps; returns the metrics of each, and leaves the adapter in `output`."""
    policy = load_policy(ModelConfig(path=str(REVIEWS / "policy")))
    reward = load_classifier(REVIEWS / "reward").bind(policy.tokenizer, policy.vocab_size, end_ids=policy.end_ids)
    guidance = reward.guidance(GUIDANCE)
    add_lora(policy, LoraConfig(r=16, alpha=32), SEED).eval()
    parameters = list(adapter_parameters(policy).values())
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.999), weight_decay=0.0)
    stream = PromptStream(load_prompts(policy, "train.jsonl"), SEED, P, ranks=1)
    history = []
    for step in range(steps):
        prompts = stream.batch(step, rank=0).repeat(G)  # B: the completions of a prompt stand together
        rollout, completions, reward_B = roll_out(policy, reward, guidance, prompts, step)
        advantage_B = zscore(reward_B, G, OBJECTIVE).float()
        loss, kl = backward(policy, rollout, advantage_B, step)
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / WARMUP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        guided_B = torch.arange(P * G) % G < GUIDED
        metrics = {"reward": reward_B.mean().item(), "loss": loss, "kl": kl, "grad_norm": float(grad_norm)}
        history.append(metrics)
        print(
            f"step {step + 1:3}  reward {metrics['reward']:6.2f} (guided {reward_B[guided_B].mean():.2f}, "
            f"unguided {reward_B[~guided_B].mean():.2f})  loss {loss:7.4f}  kl {kl:.4f}  "
            f"{prompts.texts[0]!r} -> {completions[0]!r}"
        )
    if output is not None:
        assert policy.peft_model is not None
        policy.peft_model.save_pretrained(output)  # loads with peft on the same base
        print(f"adapter: {output}")
    return history


def load_prompts(policy: Policy, name: str) -> Prompts:
    """The prompts of a file of JSON lines, in the policy's chat template."""
    rows = [json.loads(line) for line in (REVIEWS / name).read_text("utf-8").splitlines()]
    return Prompts([row["prompt"] for row in rows], rows).formatted(policy.format_prompt)


def roll_out(
    policy: Policy, reward: ClassifierReward, guidance: Guidance, prompts: Prompts, step: int
) -> tuple[Rollout, list[str], Tensor]:
    """One completion for each prompt, its text and its reward_B. The first half of each group is guided.

    A row's noise comes from a generator of its own, so it depends on nothing else in the batch.
    """
    B = len(prompts)
    guided_B = torch.arange(B) % G < GUIDED
    noise = generators(SEED, step, range(B), "rollout")
    rollout = generate(policy, prompts, ROLLOUT, noise, guidance, guided_B)
    completions = policy.decode(rollout.completion_BC)
    return rollout, completions, reward.score(prompts, completions).reward_B.cpu()


def backward(policy: Policy, rollout: Rollout, advantage_B: Tensor, step: int) -> tuple[float, float]:
    """Leave the gradient of the loss in the parameters; returns the loss and the KL to the base, nats per token.

    A diffusion LM has no left-to-right likelihood. The estimator masks parts of the prompt and all of the completion,
    and takes the log-probability of each token there; policy and base see the same canvas.
    """
    estimator, objective = ESTIMATORS[OBJECTIVE.estimator], OBJECTIVES[OBJECTIVE.name]
    canvases = estimator.draw(rollout, OBJECTIVE, generators(SEED, step, range(len(advantage_B)), "noise"))

    def log_probabilities() -> Tensor:
        values = only_logp(policy.logp)
        return estimator.estimate(values, rollout, canvases, policy.mask_id, OBJECTIVE, advantage_B)["logp"]

    with torch.no_grad(), policy.reference():  # the adapter is off
        ref_logp_BC = log_probabilities()
    out = objective.loss(
        LossInputs(
            logp_BC=log_probabilities(),
            mask_BC=canvases.count_BC,
            advantage_B=advantage_B,
            ref_logp_BC=ref_logp_BC,
        ),
        OBJECTIVE,
    )
    out.loss_sum.backward()
    for p in adapter_parameters(policy).values():
        if p.grad is not None:
            p.grad.div_(out.denominator)
    return (out.loss_sum / out.denominator).item(), (out.metrics["kl"] / out.denominator).item()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--output", type=Path, help="a new folder for the adapter, in peft's format")
    args = parser.parse_args()
    if args.output is not None and args.output.exists():
        parser.error(f"--output {args.output} exists already")
    main(args.steps, args.output)
