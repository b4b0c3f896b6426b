"""Two processes share a policy's weights and make different numbers of forward passes, with gradients.

launched_lockstep.py CONFIG OUT writes to OUT/rank_R.json how far the gradient is from that of whole weights. With a
third word the second process then goes to sleep, and the first makes one more pass.
"""

import json
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator

from rgrl.config import Config, load_config
from rgrl.models import Policy, add_lora, load_policy
from rgrl.models.lora import adapter_parameters
from rgrl.runtime.launch import join_processes
from rgrl.seeds import row_keys


def gradient(policy: Policy, passes: int) -> dict[str, torch.Tensor]:
    """Of the summed log-probabilities of as many different pairs of rows, with dropout; zeros where there is none."""
    loss = torch.zeros((), requires_grad=True)
    with policy.forward_passes(row_keys(0, 0, range(2), "test")):
        for i in range(passes):
            canvas_BL = torch.arange(12).view(2, 6) + 10 * i
            everywhere_BL = torch.ones_like(canvas_BL, dtype=torch.bool)
            loss = loss + policy.logp(canvas_BL, everywhere_BL, everywhere_BL, canvas_BL.flatten()).sum()
    policy.backward(loss)
    kept = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in adapter_parameters(policy).items()}
    policy.zero_grad(set_to_none=True)
    return kept


def compare(config: Config, accelerator: Accelerator) -> tuple[Policy, dict[str, float]]:
    policy = add_lora(load_policy(config.model), config.lora, seed=0).train()
    for p in adapter_parameters(policy).values():
        p.data.copy_(torch.arange(p.numel()).sin().view_as(p) * 0.1)
    passes = 3 * accelerator.process_index
    whole = gradient(policy, passes)
    calls: list[int] = []
    policy.causal_lm.model.register_forward_pre_hook(lambda *_: calls.append(1))
    policy.shard(accelerator.device, accelerator.num_processes, timedelta(seconds=20))
    shared = gradient(policy, passes)
    apart = max(float((shared[name] - g).abs().max()) for name, g in whole.items())
    return policy, {"calls": len(calls), "apart": apart, "largest": max(float(g.abs().max()) for g in whole.values())}


if __name__ == "__main__":
    config = load_config(sys.argv[1])
    accelerator = join_processes(config)
    policy, told = compare(config, accelerator)
    (Path(sys.argv[2]) / f"rank_{accelerator.process_index}.json").write_text(json.dumps(told))
    if len(sys.argv) > 3:
        if accelerator.process_index == 1:
            time.sleep(600)
        gradient(policy, 1)
    accelerator.end_training()
