"""One call of `update_step` on rows that do not depend on the number of processes.

launched_update.py CONFIG OUT, started on two ranks by test_launch.py, writes what each is left with to OUT.
"""

import sys
from pathlib import Path

import torch
from processes import leave
from torch import Tensor

from rgrl.checkpoint import Progress
from rgrl.config import Config, load_config
from rgrl.models.lora import adapter_parameters
from rgrl.parts import join_processes, set_up
from rgrl.step import Clock, Scored, update_step
from rgrl.types import Prompts, Rollout

ROWS, PROMPT = 8, 6


def rows(C: int) -> tuple[Rollout, Tensor]:
    """All ranks' rows with their advantages. The first half are long, so a mean of the ranks' means would differ."""
    rng = torch.Generator().manual_seed(5)
    length_B1 = torch.tensor([C, C, C, C - 1, 1, 2, 1, 3])[:, None]
    attention_BL = torch.ones(ROWS, PROMPT + C, dtype=torch.bool)
    attention_BL[::2, :2] = False
    nothing_BC = torch.zeros(ROWS, C)
    rollout = Rollout(
        canvas_BL=torch.randint(0, 4000, (ROWS, PROMPT + C), generator=rng),
        attention_BL=attention_BL,
        completion_mask_BC=torch.arange(C) < length_B1,
        unmask_step_BC=nothing_BC.long(),
        behaviour_logp_BC=nothing_BC,
        policy_logp_BC=nothing_BC,
    )
    return rollout, torch.randn(ROWS, generator=rng)


def update(config: Config) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The adapter after this rank's share of the update, the gradient of each iteration, and the metrics."""
    accelerator = join_processes(config)
    parts = set_up(config, accelerator)
    parameters = adapter_parameters(parts.policy)
    rng = torch.Generator().manual_seed(6)
    for name, p in parameters.items():
        if "lora_B" in name:  # at its start of 0, A has no gradient and the KL is 0
            p.data.normal_(std=0.1, generator=rng)
    left: dict[str, Tensor] = {}
    forwards: list[int] = []

    def keep_gradient(*_: object) -> None:
        n = sum(key.startswith("gradient") for key in left) // len(parameters)
        left.update({f"gradient {n} {name}": p.grad.clone() for name, p in parameters.items()})

    parts.optimizer.register_step_pre_hook(keep_gradient)
    parts.policy.causal_lm.model.layers[0].mlp.register_forward_pre_hook(lambda *_: forwards.append(1))
    everything, advantage_B = rows(config.rollout.max_completion_length)
    share = ROWS // accelerator.num_processes
    mine = slice(accelerator.process_index * share, (accelerator.process_index + 1) * share)
    scored = Scored(Prompts([], []), everything.rows(mine), [], torch.zeros(share), {}, advantage_B[mine], {})
    metrics = update_step(parts, scored, 0, Progress(), Clock())
    left |= {f"adapter {name}": p.detach().clone() for name, p in parameters.items()}
    return left, metrics | {"forwards": len(forwards), "ranks": accelerator.num_processes}


if __name__ == "__main__":
    config = load_config(sys.argv[1])
    left, metrics = update(config)
    leave(join_processes(config), Path(sys.argv[2]), left, metrics)
