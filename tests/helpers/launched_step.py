"""One whole step (evaluation, rollout, scores, updates) of the processes that were started, and what it left.

launched_step.py CONFIG OUT writes OUT/rank_R.safetensors (the rank's rollout, the gradients, the adapter) and
OUT/rank_R.json (metrics, numbers of forward passes, and how the frozen weights are held).
"""

import sys
from pathlib import Path

from processes import leave
from torch import Tensor
from torch.distributed.tensor import DTensor

from rgrl.config import Config, load_config
from rgrl.evaluation import generate_with
from rgrl.metrics import Clock
from rgrl.models.lora import adapter_parameters
from rgrl.runtime.launch import join_processes
from rgrl.setup import set_up
from rgrl.step import rollout_step, update_step
from rgrl.trainer import make_evaluators


def step(config: Config) -> tuple[dict[str, Tensor], dict]:
    """This rank's tensors of the step, and its metrics."""
    accelerator = join_processes(config)
    run = set_up(config, accelerator)
    parameters = adapter_parameters(run.policy)
    for name, p in parameters.items():
        if "lora_B" in name:  # at its start of 0, A has no gradient and the KL is 0
            p.data.copy_(p.data.new_tensor(range(p.numel())).sin().view_as(p) * 0.02)
    metrics, calls, gradients = {}, [0], []
    body = run.policy.causal_lm.model
    # Counts inside a layer, because that is what gradient checkpointing repeats.
    body.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(calls.pop() + 1))
    run.optimizer.register_step_pre_hook(
        lambda *_: gradients.append({name: p.grad.clone() for name, p in parameters.items()})
    )
    for evaluator in make_evaluators(run, lambda text: None):
        metrics |= evaluator(generate_with(run.policy, run.config), 0).metrics
    calls.append(0)
    scored = rollout_step(run, run.prompts(0), 0, Clock())
    calls.append(0)
    metrics |= scored.metrics | update_step(run, scored, 0, 0, Clock()).metrics
    left = {f"rollout {name}": value.contiguous() for name, value in vars(scored.rollout).items()}
    left |= {"reward": scored.reward.total_B, "advantage": scored.advantage_B}
    left |= {f"gradient {i} {name}": g for i, found in enumerate(gradients) for name, g in found.items()}
    left |= {f"adapter {name}": p.detach().clone() for name, p in parameters.items()}
    split = [p for p in body.parameters() if isinstance(p, DTensor)]
    how = {
        "ranks": accelerator.num_processes,
        "calls": dict(zip(("evaluation", "rollout", "update"), calls, strict=True)),
        "completions": scored.completions,
        "held": sum(p.to_local().numel() for p in split),
        "split": sum(p.numel() for p in split),
    }
    return left, metrics | how


if __name__ == "__main__":
    config = load_config(sys.argv[1])
    left, told = step(config)
    leave(join_processes(config), Path(sys.argv[2]), left, told)
