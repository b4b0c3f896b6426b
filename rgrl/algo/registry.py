"""The objective, estimator and advantage of a run: resolved by name once, refused where they do not fit together."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from rgrl.algo.advantages import ADVANTAGES, Advantage
from rgrl.algo.estimators import ESTIMATORS, Estimator
from rgrl.algo.objectives import OBJECTIVES, Objective
from rgrl.algo.own import own_advantage, own_estimator, own_objective
from rgrl.config import Config, ObjectiveConfig
from rgrl.config.load import GONE
from rgrl.errors import ConfigError
from rgrl.plugins import is_own, resolve

NEEDS = frozenset({"old", "ref", "behaviour", "reference_states", "old_states"})


@dataclass(frozen=True)
class Algorithm:
    """What a scored rollout is turned into: advantages, estimates, a loss."""

    objective: Objective
    estimator: Estimator
    advantage: Advantage
    needs: frozenset[str]  # of the objective and its settings (`Objective.needs`)
    own: frozenset[str] = frozenset()  # which of the three are a user's own: "objective", "estimator", "advantage"


def resolve_algorithm(config: Config) -> Algorithm:
    """The algorithm that `config.objective` names. Raises `ConfigError` for unknown names and impossible combinations.

    What an objective works with stands on the objective itself (`Objective`); nothing else knows.
    """
    o = config.objective
    trains = o.weight > 0
    objective = _resolve("objective", o.name, OBJECTIVES, Objective)
    estimator = _resolve("estimator", o.estimator, ESTIMATORS, Estimator)
    advantage = _resolve("advantage", o.advantage, ADVANTAGES, Callable)
    own = {
        what
        for what, name, known in (
            ("objective", o.name, OBJECTIVES),
            ("estimator", o.estimator, ESTIMATORS),
            ("advantage", o.advantage, ADVANTAGES),
        )
        if is_own(name, known)
    }
    if o.settings and not own:
        raise ConfigError(
            "`objective.settings` are for an objective, estimator or advantage of your own, and all three are built in"
        )
    rules = [*_combinations(o, objective, estimator), *_groups(config, objective)]
    for holds, message in rules:
        if trains and not holds:
            raise ConfigError(message)
    if o.beta > 0 and o.kl == "full":
        readouts = tuple(dict.fromkeys((*objective.readouts, "kl_to_reference")))
        objective = replace(objective, needs=objective.needs | {"reference_states"}, readouts=readouts)
    elif o.beta > 0:
        objective = replace(objective, needs=objective.needs | {"ref"})
    if "objective" in own:
        objective = own_objective(o.name, objective)
    if "estimator" in own:
        estimator = own_estimator(o.estimator, estimator)
    if "advantage" in own:
        advantage = own_advantage(o.advantage, advantage)
    return Algorithm(objective, estimator, advantage, objective.needs if trains else frozenset(), frozenset(own))


def _resolve(what: str, name: str, known: dict[str, Any], kind: Any) -> Any:
    if name == "hybrid" and what == "objective":
        raise ConfigError(f"`objective.name: hybrid` {GONE}")
    found = resolve(name, what, known)
    if not isinstance(found, kind):
        raise ConfigError(f"{what} {name!r} is not of the type {kind.__name__}")
    return found


def _combinations(o: ObjectiveConfig, objective: Objective, estimator: Estimator) -> list[tuple[bool, str]]:
    unknown = sorted(objective.needs - NEEDS)
    return [
        (not unknown, f"objective {o.name!r} needs {', '.join(unknown)}; known: {', '.join(sorted(NEEDS))}"),
        (
            "kl_to_reference" not in objective.readouts or "reference_states" in objective.needs,
            f"objective {o.name!r} reads `kl_to_reference`, so its `needs` must name `reference_states`",
        ),
        (
            not objective.estimators or o.estimator in objective.estimators,
            f"`objective.name: {o.name}` needs `objective.estimator: {' or '.join(sorted(objective.estimators))}`, "
            f"not {o.estimator}",
        ),
        (
            not objective.advantages or o.advantage in objective.advantages or ":" in o.advantage,
            f"`objective.name: {o.name}` needs `objective.advantage: {' or '.join(sorted(objective.advantages))}`, "
            f"not {o.advantage}",
        ),
        (
            "old" not in objective.needs or o.level == "sequence" or estimator.level == "token",
            f"`objective.estimator: {o.estimator}` estimates whole completions: `objective.name: {o.name}` needs "
            "`objective.level: sequence` with it",
        ),
        (
            o.correction == "none" or "behaviour" in objective.needs,
            f"`objective.name: {o.name}` takes no correction: set `objective.correction: none`",
        ),
        (
            o.correction == "none" or o.level == "token" or o.correction_level == "sequence",
            "`objective.level: sequence` needs `objective.correction_level: sequence`",
        ),
    ]


def _groups(config: Config, objective: Objective) -> list[tuple[bool, str]]:
    return [
        (
            not objective.in_groups or config.rollout.num_generations >= 2,
            f"`objective.advantage: {config.objective.advantage}` compares completions within a group: "
            "`rollout.num_generations` must be at least 2",
        ),
    ]
