"""Exchanges between processes. Functions are collective unless noted; all processes get one answer."""

import math
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import Tensor


def global_rows(accelerator: Accelerator, B: int) -> range:
    """The numbers of this rank's B rows among the rows of all ranks. Not a collective call."""
    return range(accelerator.process_index * B, (accelerator.process_index + 1) * B)


def reduce_sum(accelerator: Accelerator, value: Tensor) -> Tensor:
    """The sum over ranks of a tensor on each rank's device."""
    return accelerator.reduce(value, "sum") if accelerator.num_processes > 1 else value


def total(accelerator: Accelerator, value: Tensor) -> float:
    """The sum over ranks of a scalar on any device, as a number."""
    return float(reduce_sum(accelerator, value.to(accelerator.device)))


def counts(accelerator: Accelerator, values: list[int]) -> list[int]:
    """The sums over ranks of whole numbers, exact, in one all-reduce."""
    if accelerator.num_processes == 1:
        return values
    return reduce_sum(accelerator, torch.tensor(values, dtype=torch.int64, device=accelerator.device)).tolist()


def fraction(accelerator: Accelerator, numerator: list[Tensor], denominator: list[Tensor]) -> float:
    """The sum of the numerators over all ranks, divided by that of the denominators."""
    above = total(accelerator, sum(numerator, torch.zeros(())))
    return above / max(1.0, total(accelerator, sum(denominator, torch.zeros(()))))


def quantiles(accelerator: Accelerator, name: str, value_N: Tensor) -> dict[str, float]:
    """`NAME/p05`, `NAME/p50` and `NAME/p95` over all ranks, which may have different numbers of values.

    Of all values, or of 2^20 spread evenly over them: every process receives them, and torch sorts at most 2^24.
    """
    most = max(1, 2**20 // accelerator.num_processes)
    value_N = value_N[:: max(1, math.ceil(len(value_N) / most))]
    everywhere_N = accelerator.gather(accelerator.pad_across_processes(value_N.float(), pad_index=float("nan")))
    at_3 = everywhere_N.nanquantile(torch.tensor([0.05, 0.5, 0.95], device=everywhere_N.device))
    return {f"{name}/{q}": float(value) for q, value in zip(("p05", "p50", "p95"), at_3, strict=True)}


def set_gradient(parameters: Sequence[torch.nn.Parameter], flat: Tensor) -> None:
    """Give the parameters their pieces of a flat gradient. Not collective."""
    for p, piece in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad = piece.view_as(p)
