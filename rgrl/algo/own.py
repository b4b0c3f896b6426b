"""An objective, estimator or advantage of a user's own: called through one boundary, and what it returns checked.

Each is given copies, so that what it changes reaches neither the rollout, nor its table, nor a later update. What it
raises keeps its traceback, with a note that says whose it is; `SystemExit` and the like are an error as well.
"""

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from rgrl.algo.advantages import Advantage
from rgrl.algo.estimators import Estimator, ValuesFn
from rgrl.algo.objectives import Objective
from rgrl.config import ObjectiveConfig
from rgrl.errors import ConfigError
from rgrl.plugins import UserCodeError, call_user_code
from rgrl.types import LossInputs, LossOutputs, NoiseDraw, Rollout

T = TypeVar("T")


def own_advantage(name: str, advantage: Advantage) -> Advantage:
    """`advantage` as `in_groups` may call it. Raises `ConfigError` unless it takes (reward_B, G, config)."""
    what = f"advantage {name!r}"
    _check_arity(what, advantage, ("reward_B", "G", "config"))

    def call(reward_B: Tensor, G: int, config: ObjectiveConfig) -> Tensor:
        found = _called(what, lambda: advantage(reward_B.clone(), G, copy.deepcopy(config)))
        expect_tensor(what, found, tuple(reward_B.shape))
        return found.detach().clone().to(reward_B.device)

    return call


def own_estimator(name: str, estimator: Estimator) -> Estimator:
    """`estimator` as a step may call it. Raises `ConfigError` unless its functions take what they are given."""
    what = f"estimator {name!r}"
    _check_arity(f"{what}: `draw`", estimator.draw, ("rollout", "config", "generators"))
    names = ("values", "rollout", "noise", "mask_id", "config", "advantage_B")
    _check_arity(f"{what}: `estimate`", estimator.estimate, names)

    def draw(rollout: Rollout, config: ObjectiveConfig, generators: Sequence[torch.Generator]) -> NoiseDraw:
        given = _copied(rollout), copy.deepcopy(config), list(generators)
        noise = _called(what, lambda: estimator.draw(*given))
        if not isinstance(noise, NoiseDraw):
            raise ConfigError(f"{what}: `draw` must return a NoiseDraw, not a {type(noise).__name__}")
        (B, L), C = rollout.canvas_BL.shape, rollout.completion_mask_BC.shape[1]
        for key, shape in (("hidden_KBL", (len(noise.hidden_KBL), B, L)), ("count_BC", (B, C))):
            expect_tensor(f"{what}: `{key}` of the noise", getattr(noise, key), shape, torch.bool)
        expect_tensor(f"{what}: `weight_KBC` of the noise", noise.weight_KBC, (len(noise.hidden_KBL), B, C))
        return noise

    def estimate(
        values: ValuesFn, rollout: Rollout, noise: NoiseDraw, mask_id: int, config: ObjectiveConfig, advantage_B: Tensor
    ) -> dict[str, Tensor]:
        given = _copied(rollout), _copied(noise), mask_id, copy.deepcopy(config), advantage_B.clone()
        found = _called(what, lambda: estimator.estimate(values, *given))
        if not isinstance(found, Mapping) or "logp" not in found:
            raise ConfigError(f"{what}: `estimate` must return values by name, `logp` among them")
        expect_tensor(f"{what}: `logp` of `estimate`", found["logp"], tuple(rollout.completion_mask_BC.shape))
        return dict(found)

    return replace(estimator, draw=draw, estimate=estimate)


def own_objective(name: str, objective: Objective) -> Objective:
    """`objective` as a step may call it. Raises `ConfigError` unless its loss takes (inputs, config)."""
    what = f"objective {name!r}"
    _check_arity(f"{what}: `loss`", objective.loss, ("inputs", "config"))

    def loss(inputs: LossInputs, config: ObjectiveConfig) -> LossOutputs:
        held = ("mask_BC", "advantage_B", "old_logp_BC", "ref_logp_BC", "correction_BC")
        copies: dict[str, Any] = {key: _clone(getattr(inputs, key)) for key in held}
        given = replace(inputs, **copies, readouts=dict(inputs.readouts)), copy.deepcopy(config)
        out = _called(what, lambda: objective.loss(*given))
        if not isinstance(out, LossOutputs):
            raise ConfigError(f"{what}: `loss` must return LossOutputs, not a {type(out).__name__}")
        for key, value in {"loss_sum": out.loss_sum, "denominator": out.denominator, **out.metrics}.items():
            expect_tensor(f"{what}: `{key}` of the loss", value, ())
        for key, value in out.samples.items():
            expect_tensor(f"{what}: `{key}` of the loss's samples", value, (getattr(value, "numel", int)(),))
        if not out.loss_sum.requires_grad:
            raise ConfigError(f"{what}: its loss has no gradient; compute it from `inputs.logp_BC`, not detached")
        return out

    return replace(objective, loss=loss)


def expect_tensor(what: str, value: Any, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> None:
    """Raise `ConfigError` unless `value` is a tensor of this shape and type (None: real numbers)."""
    if not isinstance(value, Tensor):
        raise ConfigError(f"{what} must be a tensor, not a {type(value).__name__}", on_one_rank=True)
    if tuple(value.shape) != shape:
        raise ConfigError(f"{what} has the shape {tuple(value.shape)}, expected {shape}", on_one_rank=True)
    if (dtype is not None and value.dtype != dtype) or value.is_complex():
        raise ConfigError(f"{what} is of the type {value.dtype}, expected {dtype or 'numbers'}", on_one_rank=True)


def _check_arity(what: str, function: Any, names: tuple[str, ...]) -> None:
    if not callable(function):
        raise ConfigError(f"{what} cannot be called: it is {function!r}")
    try:
        inspect.signature(function).bind(*names)
    except TypeError as error:
        raise ConfigError(f"{what} must take ({', '.join(names)}): {error}") from error
    except ValueError:  # a builtin may have no signature
        return


def _called(what: str, action: Callable[[], T]) -> T:
    try:
        return call_user_code(what, action)
    except UserCodeError as failure:
        cause = failure.__cause__
        if isinstance(cause, Exception):
            cause.add_note(what)
            raise cause from cause.__cause__
        raise ConfigError(str(failure), on_one_rank=True) from cause


def _clone(tensor: Tensor | None) -> Tensor | None:
    return tensor.clone() if tensor is not None else None


def _copied(bundle: Any) -> Any:
    """A rollout or a draw of noise with tensors of its own."""
    return type(bundle)(**{name: value.clone() for name, value in vars(bundle).items()})
