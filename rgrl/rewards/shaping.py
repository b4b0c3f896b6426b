"""What is paid of each part of the reward, and how much it counts in a group: clip, only_if, normalise.

Each is a function of one completion or of one group of them, and of fixed settings. A group is always on one process,
so neither the number of processes nor a resumed run changes a number.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rgrl.algo.advantages import zero_spread
from rgrl.errors import ConfigError


@dataclass(frozen=True)
class Shape:
    """How one part of the reward is shaped."""

    clip: tuple[float, float] | None = None
    normalise: bool = False
    only_if: str | None = None


def paid(terms: Mapping[str, Tensor], shapes: Mapping[str, Shape]) -> dict[str, Tensor]:
    """Each part r_B as it is paid: clipped, and 0 where the part that `only_if` names does not pay more than 0.

    Where that one is NaN (no reward), nobody knows if it holds, and the part is NaN too. `shapes` hold no cycles.
    """
    found: dict[str, Tensor] = {}

    def pay(name: str) -> Tensor:
        if name not in found:
            shape, r_B = shapes.get(name, Shape()), terms[name]
            if shape.clip is not None:
                r_B = r_B.clamp(*shape.clip)
            if shape.only_if is not None:
                other_B = pay(shape.only_if)
                r_B = torch.where(other_B > 0, r_B, torch.zeros_like(r_B)).masked_fill(
                    other_B.isnan() | r_B.isnan(), math.nan
                )
            found[name] = r_B
        return found[name]

    return {name: pay(name) for name in terms}


def weighted_sum(terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """The sum r_B of the parts times their weights; NaN parts are left out, and it is NaN where all of them are.

    A part of weight 0 is no part of it, so what only that one rates is NaN too; unless no part has another weight.
    Raises `ConfigError` for a sum that float32 cannot hold.
    """
    counted = {name: r_B for name, r_B in terms.items() if weights[name]} or terms
    summands = [weights[name] * r_B.nan_to_num(nan=0.0) for name, r_B in counted.items()]
    rated_B = torch.stack([~r_B.isnan() for r_B in counted.values()]).any(0)
    total_B = torch.stack(summands).sum(0)
    if not total_B.isfinite().all():
        told = ", ".join(f"{name} {weights[name]:g}" for name in counted)
        raise ConfigError(f"the sum of rewards is too large for float32; their weights are {told}", on_one_rank=True)
    return total_B.masked_fill(~rated_B, math.nan)


def normalised(r_B: Tensor, G: int) -> Tensor:
    """A part in standard deviations of its group from the group's mean: GDPO, arXiv 2601.05242.

    Of the completions that have a reward (others stay NaN). 0 in a group whose values are all equal.
    """
    result_B = r_B.clone()
    for group_G, same in zip(result_B.view(-1, G), zero_spread(r_B, G).tolist(), strict=True):
        rated_G = ~group_G.isnan()
        r_N = group_G[rated_G].double()
        z_N = torch.zeros_like(r_N) if same else (r_N - r_N.mean()) / r_N.std()
        group_G[rated_G] = z_N.to(group_G.dtype)
    return result_B


def check_shapes(shapes: Mapping[str, Shape], names: Iterable[str], never: Iterable[str]) -> None:
    """Raise `ConfigError` for an `only_if` of nothing, in a circle, or of one in `never`, which is not above 0."""
    known, never = list(names), list(never)
    for name, shape in shapes.items():
        other, way = shape.only_if, [name]
        if other is not None and other not in known:
            raise ConfigError(
                f"reward {name!r}: no part of the reward is called {other!r} (`only_if`); known: {_list(known)}"
            )
        if other in never:
            raise ConfigError(f"reward {name!r}: `only_if: {other}` would never hold, as a penalty is not above 0")
        while other is not None:
            if other in way:
                raise ConfigError(f"reward {name!r}: `only_if` goes in a circle: {' -> '.join([*way, other])}")
            way.append(other)
            other = shapes[other].only_if if other in shapes else None


def _list(names: list[str]) -> str:
    return ", ".join(names) or "none"
