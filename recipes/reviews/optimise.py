"""The training loop that policies and students share: resumable, on one or two CPU cores."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

ARITHMETIC = torch.bfloat16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else torch.float32


def train(
    name: str,
    work: Path,
    model: torch.nn.Module,
    loss_fn: Callable[[torch.nn.Module, int], Tensor],
    steps: int,
    learning_rate: float,
    weight_decay: float = 0.05,
) -> None:
    """Muon on the matrices, AdamW on the rest, arithmetic in ARITHMETIC over float32 weights, linear decay to 0.

    `loss_fn(model, step)` draws its own batch from `step`, so the state that a resumed run needs is the
    weights, the two optimizers and one integer. Saved every 200 steps to `work/NAME.pt`.
    """
    master = {k: p.detach().clone().float() for k, p in model.named_parameters()}
    # Muon makes its matrices orthogonal in bf16, which takes a CPU without it longer than all the rest.
    muon = ARITHMETIC == torch.bfloat16
    matrices = [k for k, p in master.items() if muon and p.ndim == 2 and "embed" not in k and "score" not in k]
    others = [k for k in master if k not in matrices]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW([master[k] for k in others], lr=learning_rate, weight_decay=0.01, betas=(0.9, 0.98))
    ]
    if matrices:
        kept = [master[k] for k in matrices]
        optimizers.insert(
            0, torch.optim.Muon(kept, lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        )
    state_path, start = work / f"{name}.pt", 0
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        start = state["step"]
        for k, value in state["master"].items():
            master[k].copy_(value)
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    parameters = dict(model.named_parameters())
    model.to(ARITHMETIC).train()

    def refresh() -> None:
        for k, p in parameters.items():
            p.data.copy_(master[k])

    refresh()
    average = None
    for step in range(start, steps):
        loss = loss_fn(model, step)
        loss.backward()
        for k, p in parameters.items():
            master[k].grad = p.grad.float() if p.grad is not None else None
            p.grad = None
        torch.nn.utils.clip_grad_norm_(master.values(), 1.0)
        scale = min(1.0, (step + 1) / 100) * (1 - step / steps)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * scale
            optimizer.step()
        refresh()
        average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
        if (step + 1) % 200 == 0 or step + 1 == steps:
            print(f"{name} step {step + 1}/{steps} loss {average:.4f}", flush=True)
            partial = state_path.with_suffix(".tmp")
            torch.save(
                {"step": step + 1, "master": master, "optimizers": [o.state_dict() for o in optimizers]}, partial
            )
            partial.replace(state_path)
    model.eval()
