"""One whole step (evaluation, rollout, scores, update) of the processes that were started, and what it left.

launched_step.py CONFIG OUT writes OUT/rank_R.safetensors (the rank's rollout, the gradient, the adapter) and
OUT/rank_R.json (metrics and how the frozen weights are held).
"""

import sys
from pathlib import Path

from processes import leave
from torch import Tensor
from torch.distributed.tensor import DTensor

from rgrl.checkpoint import Progress
from rgrl.config import Config, load_config
from rgrl.evaluation import evaluate
from rgrl.models.lora import adapter_parameters
from rgrl.parts import join_processes, set_up
from rgrl.step import Clock, rollout_step, update_step


def step(config: Config) -> tuple[dict[str, Tensor], dict]:
    """The tensors and the metrics of this rank's share of the step."""
    accelerator = join_processes(config)
    parts = set_up(config, accelerator)
    parameters = adapter_parameters(parts.policy)
    for name, p in parameters.items():
        if "lora_B" in name:  # at its start of 0, A has no gradient and the KL is 0
            p.data.copy_(p.data.new_tensor(range(p.numel())).sin().view_as(p) * 0.02)
    told = {}
    if parts.eval_prompts is not None:
        told |= evaluate(config, accelerator, parts.policy, parts.rewards, parts.judge, parts.eval_prompts).metrics
    calls: list[int] = []
    body = parts.policy.causal_lm.model
    handle = body.register_forward_pre_hook(lambda *_: calls.append(1))
    scored = rollout_step(parts, 0, Clock())
    handle.remove()
    left = {f"rollout {name}": value.contiguous() for name, value in vars(scored.rollout).items()}
    left |= {"reward": scored.reward_B, "advantage": scored.advantage_B}
    gradients: dict[str, Tensor] = {}
    parts.optimizer.register_step_pre_hook(
        lambda *_: gradients.update({f"gradient {name}": p.grad.clone() for name, p in parameters.items()})
    )
    told |= scored.metrics | update_step(parts, scored, 0, Progress(), Clock())
    left |= gradients | {f"adapter {name}": p.detach().clone() for name, p in parameters.items()}
    cut = [p for p in body.parameters() if isinstance(p, DTensor)]
    told |= {
        "ranks": accelerator.num_processes,
        "calls": len(calls),
        "completions": scored.completions,
        "held": sum(p.to_local().numel() for p in cut),
        "cut": sum(p.numel() for p in cut),
    }
    return left, told


if __name__ == "__main__":
    config = load_config(sys.argv[1])
    left, told = step(config)
    leave(join_processes(config), Path(sys.argv[2]), left, told)
