"""The terms of an update's loss: what they share, and the gradient of each. `step.py` adds them up.

The objective turns a scored rollout into a loss on the tokens that were written. The reward's own gradient, where it is
turned on, moves the expected embeddings of all tokens that could have been written.
"""

import itertools
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rgrl.algo.corrections import correction
from rgrl.algo.estimators import ValuesFn
from rgrl.algo.reward_gradient import (
    MEANS_OVER,
    Expansion,
    Measured,
    State,
    came_true,
    centred,
    distance_to_guided,
    draw_steps,
    expand,
    expected_text,
    first_order,
    kl_by_row,
    mean_of_others,
    overuse,
    row_weights,
    state_before,
    term_sums,
    text_gradients,
    text_tokens,
)
from rgrl.config import Config
from rgrl.models.lora import adapter_parameters
from rgrl.models.readout import Places, Readout, finite_log_softmax, kl_to_reference, read_out, summed_probabilities
from rgrl.rollout.guidance import Guide
from rgrl.runtime.collectives import global_rows, reduce_sum, take_gradient
from rgrl.seeds import generators, row_keys
from rgrl.setup import Run
from rgrl.types import LossInputs, NoiseDraw, Prompts, Rollout


@dataclass
class Scored:
    """A rollout with its text, its reward and its advantages."""

    prompts: Prompts  # B, each prompt G times
    rollout: Rollout
    completions: list[str]
    reward_B: Tensor
    terms: dict[str, Tensor]  # r_B of each term of the reward, unweighted
    advantage_B: Tensor
    metrics: dict[str, float]
    guided_B: Tensor | None = None  # bool, which completions were steered; None: none


@dataclass
class Push:
    """One state of the term, with what its loss is made of, as far as it is known before the policy's forward pass."""

    state: State
    reference: dict[str, Tensor]  # the base's final hidden states there, for the KL; empty without it
    found: Expansion | None = None
    g_ND: Tensor | None = None  # what the expected embeddings move along
    price_V: Tensor | None = None  # of each token, for being written more than the base would: the KL of the averages


@dataclass
class Drawn:
    """Canvases that the objective reads, and what is known there. Lists have an entry for each micro-batch."""

    noise: NoiseDraw
    old: list[Tensor | None]  # log-probabilities (BC) before the first update
    reference: list[Tensor | None]  # log-probabilities (BC) of the frozen base; None: not needed
    reference_states: list[list[Tensor]]  # its final hidden states (NH), by canvas; empty: not needed
    old_states: list[list[Tensor]]  # the same of the policy before the first update


@dataclass
class Batch:
    """What all updates on one rollout share. Lists have an entry for each micro-batch; None or empty: not needed."""

    rollout: Rollout
    advantage_B: Tensor
    micro: list[slice]
    drawn: list[Drawn] = field(default_factory=list)  # one for all updates, or with `objective.redraw` one for each
    correction_BC: Tensor | None = None
    row_gradient_BCD: Tensor | None = None  # of the reward, the mean over the other completions of the group
    guide: Guide | None = None  # the reward whose gradient is a term of the update
    step_UKB: Tensor | None = None  # the denoising steps of that term, for each update
    kept: list[Push] = field(default_factory=list)  # of its first update, if the others use them again
    measured: list[Measured] = field(default_factory=list)  # of its last update, if this step is to measure it

    @property
    def the_guide(self) -> Guide:
        """The guide, where something of the update needs it."""
        assert self.guide is not None
        return self.guide


def prepare(run: Run, scored: Scored, step: int) -> Batch:
    """Draw the noise, weigh the tokens, and evaluate the reference: once for all updates on this rollout."""
    config, needs, rollout = run.config, run.algorithm.needs, scored.rollout
    B = len(rollout.canvas_BL)
    size = B // config.run.gradient_accumulation_steps
    batch = Batch(rollout, scored.advantage_B, [slice(i, i + size) for i in range(0, B, size)])
    if run.gradient_model is not None:
        batch.guide = run.reward_of_embeddings(scored.prompts)
    if config.gradient.weight > 0:
        seeds = generators(config.run.seed, step, global_rows(run.accelerator, B), "states")
        batch.step_UKB = draw_steps(rollout, config.gradient, config.rollout, seeds, config.objective.iterations)
    if config.objective.weight == 0:
        return batch
    batch.correction_BC = correction(rollout, config.objective) if "behaviour" in needs else None
    if "row_gradients" in needs:
        batch.row_gradient_BCD = row_gradients(run, batch)
    for iteration in range(config.objective.iterations if config.objective.redraw else 1):
        batch.drawn.append(draw(run, batch, step, iteration))
    return batch


def draw(run: Run, batch: Batch, step: int, iteration: int) -> Drawn:
    """The noise of an update and the reference there. From the second update on, the policy as it is before the first
    is evaluated too, with the dropout of that update: before anything has moved, all ratios are 1."""
    needs, micro = run.algorithm.needs, len(batch.micro)
    rows = global_rows(run.accelerator, len(batch.advantage_B))
    seeds = generators(run.config.run.seed, step, rows, f"noise {iteration}" if iteration else "noise")
    noise = run.algorithm.estimator.draw(batch.rollout, run.config.objective, seeds)
    states: list[list[list[Tensor]]] = [[[] for _ in range(micro)] for _ in range(2)]
    drawn = Drawn(noise, [None] * micro, [None] * micro, *states)
    if {"ref", "reference_states"} & needs:
        with torch.no_grad(), run.policy.forward_passes(), run.policy.reference():
            for m, kept in enumerate(drawn.reference_states):
                values = values_before(run, kept, "ref" in needs, "reference_states" in needs)
                drawn.reference[m] = estimate(run, batch, drawn, m, values)["logp"]
    if iteration > 0 and {"old", "old_states"} & needs:
        key_B = dropout_keys(run, batch, step, f"dropout {iteration}")
        run.policy.train()
        for m, kept in enumerate(drawn.old_states):
            with torch.no_grad(), run.policy.forward_passes(key_B[batch.micro[m]]):
                values = values_before(run, kept, "old" in needs, "old_states" in needs)
                found = estimate(run, batch, drawn, m, values)["logp"]
            drawn.old[m] = found if "old" in needs else None
        run.policy.eval()
    return drawn


@dataclass
class Term:
    """One term of the loss over this rank's micro-batches: sums, and the gradient of the loss's sum, not yet divided.

    `totals` holds the loss, its metrics, and what each is divided by: `n`, unless `over` names another.
    """

    weight: float
    totals: dict[str, Tensor] = field(default_factory=dict)
    over: dict[str, str] = field(default_factory=dict)
    samples: dict[str, list[Tensor]] = field(default_factory=dict)  # values for quantiles
    gradient: Tensor = field(default_factory=lambda: torch.zeros(()))  # of all parameters, flat

    def add(self, values: dict[str, Tensor]) -> None:
        """Add to the sums."""
        for name, value in values.items():
            self.totals[name] = self.totals[name] + value.detach() if name in self.totals else value.detach()


def dropout_keys(run: Run, batch: Batch, step: int, purpose: str) -> Tensor:
    """key_B of this rank's rows, for LoRA dropout."""
    return row_keys(run.config.run.seed, step, global_rows(run.accelerator, len(batch.advantage_B)), purpose)


# ------------------------------------------------------------------------------------------------------- the objective
def objective_gradient(run: Run, batch: Batch, step: int, iteration: int) -> Term:
    """The objective: one forward and backward pass over each micro-batch."""
    config, policy, algorithm, term = run.config, run.policy, run.algorithm, Term(run.config.objective.weight)
    drawn = batch.drawn[iteration if config.objective.redraw else 0]
    key_B = dropout_keys(run, batch, step, f"dropout {iteration}")
    policy.train()  # gradient checkpointing and LoRA dropout are off otherwise
    for m, rows in enumerate(batch.micro):
        with policy.forward_passes(key_B[rows]):
            values = estimate(run, batch, drawn, m, trained_values(run, batch, drawn, m))
        if "old" in algorithm.needs and iteration == 0:  # nothing has moved yet, so these are the old ones
            drawn.old[m] = values["logp"].detach()
        inputs = LossInputs(
            logp_BC=values["logp"],
            mask_BC=drawn.noise.count_BC[rows],
            advantage_B=batch.advantage_B[rows],
            by_sequence=algorithm.estimator.level == "sequence",
            old_logp_BC=drawn.old[m],
            ref_logp_BC=drawn.reference[m] if "ref" in algorithm.needs else None,
            correction_BC=batch.correction_BC[rows] if batch.correction_BC is not None else None,
            readouts={name: value for name, value in values.items() if name != "logp"},
        )
        out = algorithm.objective.loss(inputs, config.objective)
        policy.backward(out.loss_sum)
        term.add({"loss": out.loss_sum, "n": out.denominator, **out.metrics})
        for name, value in out.samples.items():
            term.samples.setdefault(name, []).append(value)
    policy.eval()
    term.gradient = take_gradient(list(adapter_parameters(policy).values()))
    return term


def estimate(run: Run, batch: Batch, drawn: Drawn, m: int, values: ValuesFn) -> dict[str, Tensor]:
    """The estimator's values (BC...) of micro-batch m, by name."""
    rows = batch.micro[m]
    rollout, noise, advantage_B = batch.rollout.rows(rows), drawn.noise.rows(rows), batch.advantage_B[rows]
    estimator, mask_id = run.algorithm.estimator, run.policy.mask_id
    return estimator.estimate(values, rollout, noise, mask_id, run.config.objective, advantage_B)


def values_before(run: Run, states: list[Tensor], logp: bool, keep: bool) -> ValuesFn:
    """Log-probabilities on each canvas before any update, if `logp`; its final hidden states go into `states`, if
    `keep`, for readouts that compare with them."""

    def values(k: int, canvas_BL: Tensor, attention_BL: Tensor, at_BL: Tensor, token_N: Tensor) -> dict[str, Tensor]:
        states_NH = run.policy.states(canvas_BL, attention_BL)[at_BL]
        if keep:
            states.append(states_NH)
        if not logp:
            return {"logp": torch.zeros(len(token_N), device=token_N.device)}  # nobody asks for them
        return read_out(
            run.policy.project, states_NH, token_N, {"logp": run.readouts["logp"]}, vocab_size=run.policy.vocab_size
        )

    return values


def row_gradients(run: Run, batch: Batch) -> Tensor:
    """What the objective asks for as `row_gradients`: mean_BCD of the other completions, in units of the reward."""
    number_B = torch.arange(len(batch.advantage_B), device=run.policy.device)
    found = [
        text_gradients(batch.the_guide, batch.rollout.rows(rows), number_B[rows], run.policy.is_end)
        for rows in batch.micro
    ]
    return run.gradient_weight * mean_of_others(torch.cat(found), run.config.rollout.num_generations)


def trained_values(run: Run, batch: Batch, drawn: Drawn, m: int) -> ValuesFn:
    """All readouts on each canvas of micro-batch m, with gradient."""
    reference, old, gradient_BCD = drawn.reference_states[m], drawn.old_states[m], batch.row_gradient_BCD

    def values(k: int, canvas_BL: Tensor, attention_BL: Tensor, at_BL: Tensor, token_N: Tensor) -> dict[str, Tensor]:
        states_NH = run.policy.states(canvas_BL, attention_BL)[at_BL]
        given = {"reference_NH": reference[k]} if reference else {}
        if "old_states" in run.algorithm.needs:
            if len(old) == k:  # nothing has moved yet, so these are the old ones
                old.append(states_NH.detach())
            given["old_NH"] = old[k]
        if gradient_BCD is not None:
            given["gradient_ND"] = gradient_BCD[batch.micro[m]][at_BL[:, -gradient_BCD.shape[1] :]]
        vocab_size = run.policy.vocab_size
        return read_out(run.policy.project, states_NH, token_N, run.readouts, given, vocab_size=vocab_size)

    return values


# ------------------------------------------------------------------------------------------- the reward's own gradient
def reward_term_gradient(run: Run, batch: Batch, step: int, iteration: int) -> Term:
    """The reward's own gradient (rgrl/algo/reward_gradient.py), at each state that was drawn for this update: a forward
    pass of the base, the policy and the reward model, and a backward pass, over each micro-batch."""
    config, policy, term = run.config.gradient, run.policy, Term(run.config.gradient.weight, over=MEANS_OVER)
    key_B = dropout_keys(run, batch, step, f"gradient dropout {iteration}")
    pushes = batch.kept if batch.kept else reward_pushes(run, batch, iteration, key_B)
    policy.train()
    for push in pushes:
        state = push.state
        with policy.forward_passes(key_B[state.rows_B.cpu()]):
            states_NH = policy.states(state.canvas(policy.mask_id), state.rollout.attention_BL)[state.at_BL]
        values = read_text(run, batch, push, states_NH, alone=config.loss != "first_order")
        if push.found is None:
            push.found = expand(batch.the_guide, state, values, config.blend)
            push.g_ND = push.found.g_ND
            if config.centre == "row":
                push.g_ND = centred(push.g_ND, push.found.soft_N, state)
        loss_sum = reward_loss(run, batch, push, states_NH, values) / config.draws
        policy.backward(loss_sum)
        term.add({"loss": loss_sum, **term_sums(push.found, values, state, config.draws)})
        if measures(run.config, step, iteration):
            batch.measured.append(Measured(state, push.found, values["soft"].detach(), key_B[state.rows_B.cpu()]))
    policy.eval()
    batch.kept = pushes if config.reuse else []
    term.gradient = take_gradient(list(adapter_parameters(policy).values()))
    return term


def reward_pushes(run: Run, batch: Batch, iteration: int, key_B: Tensor) -> list[Push]:
    """The states of an update, with what depends on all of them together, before any is learned from."""
    config = run.config.gradient
    pushes = [Push(state, reference_given(run, state)) for state in reward_states(run, batch, iteration)]
    if config.centre == "batch" or config.marginal > 0:
        run.policy.train()
        states = [states_without_gradient(run, push.state, key_B[push.state.rows_B.cpu()]) for push in pushes]
        if config.centre == "batch":
            centre_on_batch(run, batch, pushes, states)
        if config.marginal > 0:
            price_overuse(run, pushes, states)
    return pushes


@torch.no_grad()
def states_without_gradient(run: Run, state: State, dropout_key_B: Tensor) -> Tensor:
    """The policy's final hidden states (NH) at the asked places, by a forward pass of its own."""
    policy = run.policy
    with policy.forward_passes(dropout_key_B):
        return policy.states(state.canvas(policy.mask_id), state.rollout.attention_BL)[state.at_BL]


def centre_on_batch(run: Run, batch: Batch, pushes: list[Push], states: list[Tensor]) -> None:
    """Expand each state, and take from its gradients the mean over all places of all processes."""
    total = torch.zeros(batch.the_guide.embedding_VD.shape[1] + 1, device=run.policy.device)
    for push, states_NH in zip(pushes, states, strict=True):
        with torch.no_grad():
            values = read_text(run, batch, push, states_NH, alone=True)
        push.found = expand(batch.the_guide, push.state, values, run.config.gradient.blend)
        total += torch.cat([push.found.g_ND.float().sum(0), push.found.soft_N.sum()[None]])
    *_, count = total = reduce_sum(run.accelerator, total)
    for push in pushes:
        assert push.found is not None
        direction_D = (total[:-1] / count.clamp(min=1.0)).to(push.found.g_ND.dtype)
        direction_BD = direction_D.expand(len(push.state.rows_B), -1)
        push.g_ND = centred(push.found.g_ND, push.found.soft_N, push.state, direction_BD)


def price_overuse(run: Run, pushes: list[Push], states: list[Tensor]) -> None:
    """The price of each token, from the policy's distribution and the base's over all places of all processes."""
    policy, vocab_size = run.policy, run.policy.vocab_size
    total_2V = torch.zeros(2, vocab_size, device=policy.device)
    for push, states_NH in zip(pushes, states, strict=True):
        weight_N = row_weights(push.state)
        total_2V[0] += summed_probabilities(policy.project, states_NH, weight_N, vocab_size=vocab_size)
        base_NH = push.reference["reference_NH"]
        total_2V[1] += summed_probabilities(policy.project, base_NH, weight_N, vocab_size=vocab_size)
    price_V = overuse(*reduce_sum(run.accelerator, total_2V))
    for push in pushes:
        push.price_V = price_V


def reward_states(run: Run, batch: Batch, iteration: int) -> list[State]:
    """The states of an update: of each micro-batch as many as `gradient.draws` says."""
    config, states = run.config, []
    assert batch.step_UKB is not None
    block = config.rollout.block_length if config.gradient.places == "block" else 0
    number_B = torch.arange(len(batch.advantage_B), device=run.policy.device)
    for step_B, rows in itertools.product(batch.step_UKB[iteration], batch.micro):
        some = batch.rollout.rows(rows), number_B[rows], step_B[rows]
        states.append(state_before(*some, batch.the_guide, run.policy.is_end, block))
    return states


def reference_given(run: Run, state: State) -> dict[str, Tensor]:
    """The frozen base's final hidden states at the asked places, for the KLs to it; nothing without them."""
    policy = run.policy
    if run.config.gradient.kl == 0 and run.config.gradient.marginal == 0:
        return {}
    with torch.no_grad(), policy.forward_passes(), policy.reference():
        return {"reference_NH": policy.states(state.canvas(policy.mask_id), state.rollout.attention_BL)[state.at_BL]}


def divergences(push: Push) -> dict[str, Readout]:
    """How far the policy is from the base at each place: `kl_to_reference`, and what its words cost, `marginal`."""
    readouts: dict[str, Readout] = {}
    if push.reference:
        readouts["kl_to_reference"] = kl_to_reference
    if (price_V := push.price_V) is not None:
        readouts["marginal"] = lambda places: finite_log_softmax(places.logits_NV).exp() @ price_V.to(places.logits_NV)
    return readouts


def read_text(run: Run, batch: Batch, push: Push, states_NH: Tensor, alone: bool = False) -> dict[str, Tensor]:
    """`expected_text` at the asked places, and unless `alone` the `divergences`."""
    guide, text_V = batch.the_guide, text_tokens(batch.the_guide, run.policy.is_end)

    def text(places: Places) -> dict[str, Tensor]:
        return expected_text(places.logits_NV, places.token_N, guide.embedding_VD, text_V, run.config.rollout)

    readouts = {"text": text} | ({} if alone else divergences(push))
    given, vocab_size = {} if alone else push.reference, run.policy.vocab_size
    return read_out(run.policy.project, states_NH, push.state.token_N, readouts, given, vocab_size=vocab_size)


def reward_loss(run: Run, batch: Batch, push: Push, states_NH: Tensor, values: dict[str, Tensor]) -> Tensor:
    """The term's loss, summed over rows; adds its divergences from the base to `values`."""
    config, guide, state = run.config.gradient, batch.the_guide, push.state
    assert push.g_ND is not None
    g_ND = run.gradient_weight * push.g_ND
    if config.loss == "first_order":
        loss_sum = -first_order(g_ND, values["soft"])
    else:
        text_V, tau = text_tokens(guide, run.policy.is_end), run.config.rollout.temperature

        def distance(places: Places) -> Tensor:
            g_nD = places.given["g_ND"]
            return distance_to_guided(places.logits_NV, g_nD, guide.embedding_VD, text_V, tau, config)

        readouts: dict[str, Readout] = {"distance": distance} | divergences(push)
        given, vocab_size = {"g_ND": g_ND, **push.reference}, run.policy.vocab_size
        found = read_out(run.policy.project, states_NH, state.token_N, readouts, given, vocab_size=vocab_size)
        loss_sum = kl_by_row(found.pop("distance"), state).sum()
        values |= found
    if config.kl > 0:
        loss_sum = loss_sum + config.kl * kl_by_row(values["kl_to_reference"], state).sum()
    if config.marginal > 0:
        loss_sum = loss_sum + config.marginal * kl_by_row(values["marginal"], state).sum()
    return loss_sum


def measures(config: Config, step: int, iteration: int) -> bool:
    """Whether this update is one to measure: the last of every `gradient.measure_steps`-th step."""
    every = config.gradient.measure_steps
    return every > 0 and step % every == 0 and iteration == config.objective.iterations - 1


@torch.no_grad()
def what_came_true(run: Run, batch: Batch) -> dict[str, float]:
    """The change of the reward that the last update promised to first order, and the one that came true, a row."""
    sums = []
    run.policy.train()
    for measured in batch.measured:
        states_NH = states_without_gradient(run, measured.state, measured.dropout_key_B)
        values = read_text(run, batch, Push(measured.state, {}), states_NH, alone=True)
        sums.append(torch.stack(came_true(batch.the_guide, measured, values)))
    run.policy.eval()
    rows = torch.tensor([float(len(batch.advantage_B) * run.config.gradient.draws)], device=run.policy.device)
    *both, rows = reduce_sum(run.accelerator, torch.cat([torch.stack(sums).sum(0).float(), rows])).tolist()
    return {
        name: run.gradient_weight * value / rows
        for name, value in zip(("gradient/promised", "gradient/came_true"), both, strict=True)
    }
