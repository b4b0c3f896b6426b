"""Readouts in recomputed chunks against the same formulas over whole logits: values and gradients."""

import bench
import pytest
import torch

from rgrl.algo.reward_gradient import expected_text
from rgrl.config import RolloutConfig
from rgrl.models import readout
from rgrl.models.readout import READOUTS, read_out
from rgrl.rollout.sampling import sampled_logp

V, H, D, MASK = 37_500, 8, 5, 7
CHUNK = 2**18  # logits: six places
N = 20


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """An eighth of what a chunk is otherwise, with an eighth of the largest vocabularies."""
    monkeypatch.setattr(readout, "CPU_CHUNK", CHUNK)


@pytest.fixture(scope="module")
def case() -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    shapes = {"head_VH": (V, H), "states_NH": (N, H), "reference_NH": (N, H), "old_NH": (N, H), "table_VD": (V, D)}
    made = {name: torch.randn(shape, generator=rng) for name, shape in shapes.items()}
    return made | {"token_N": torch.randint(8, V, (N,), generator=rng), "other_N": torch.randn(N, generator=rng)}


def project(case):
    def logits(states):
        out = states @ case["head_VH"].T
        out[..., MASK] = float("-inf")
        return out

    return logits


def slow(case, states_NH) -> dict[str, torch.Tensor]:
    """Each readout by its formula, the impossible token left out of every sum."""
    possible = torch.arange(V) != MASK
    logits_NV = (states_NH @ case["head_VH"].T)[:, possible]
    logp_NV = logits_NV.log_softmax(-1)
    reference_NV = (case["reference_NH"] @ case["head_VH"].T)[:, possible].log_softmax(-1)
    column_N1 = (case["token_N"] - (case["token_N"] > MASK).long())[:, None]
    return {
        "token_logp": logp_NV.gather(1, column_N1)[:, 0],
        "kl_to_reference": (logp_NV.exp() * (logp_NV - reference_NV)).sum(-1),
        "cross_entropy_to_old": -((case["old_NH"] @ case["head_VH"].T)[:, possible].softmax(-1) * logp_NV).sum(-1),
        "embedding": (logits_NV / 0.7).softmax(-1) @ case["table_VD"][possible],
    }


def readouts(case):
    everything_V, sampler = torch.ones(V, dtype=torch.bool), RolloutConfig(temperature=0.7, top_k=0, top_p=1.0)

    def text(places):  # several values by their own names
        found = expected_text(places.logits_NV, places.token_N, case["table_VD"], everything_V, sampler)
        return {"embedding": found["soft"]}

    return READOUTS | {"text": text}


@pytest.mark.parametrize("places", [N, 3])  # in several chunks, and in one
def test_values_and_gradients_are_those_of_whole_logits(case, places):
    case = {name: value[:places] if name.endswith(("_N", "_NH")) else value for name, value in case.items()}
    results = []
    for compute in (
        lambda states: read_out(
            project(case),
            states,
            case["token_N"],
            readouts(case),
            {name: case[name] for name in ("reference_NH", "old_NH")},
            vocab_size=V,
        ),
        lambda states: slow(case, states),
    ):
        states_NH = case["states_NH"].clone().requires_grad_()
        values = compute(states_NH)
        gradients = {}
        for name, value in values.items():
            weights = case["other_N"].view(-1, *[1] * (value.ndim - 1))
            (gradients[name],) = torch.autograd.grad((weights * value).sum(), states_NH, retain_graph=True)
        results.append((values, gradients))
    assert results[0][0].keys() == results[1][0].keys() == {*READOUTS, "embedding"}
    for fast, exact in zip(*results, strict=True):
        for name, value in fast.items():
            assert value.isfinite().all() and value.abs().max() > 1e-4
            torch.testing.assert_close(
                value, exact[name], rtol=1e-3, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
            )


def test_a_reference_that_is_the_policy_is_no_distance_away(case):
    states_NH = case["states_NH"].clone().requires_grad_()
    given = {"reference_NH": case["states_NH"], "old_NH": case["old_NH"]}
    kl_N = read_out(project(case), states_NH, case["token_N"], READOUTS, given, vocab_size=V)["kl_to_reference"]
    (g_NH,) = torch.autograd.grad(kl_N.sum(), states_NH)
    assert kl_N.abs().max() < 1e-5 and g_NH.abs().max() < 1e-4


def test_a_users_readout_gets_its_own_inputs_chunk_by_chunk(case):
    seen = []

    def mine(places):
        seen.append(len(places.token_N))
        return sampled_logp(places.logits_NV, places.token_N, 0.8, 50, 0.95) * places.given["other_N"]

    with torch.no_grad():
        given = {"other_N": case["other_N"]}
        value_N = read_out(project(case), case["states_NH"], case["token_N"], {"mine": mine}, given, vocab_size=V)
        logits_NV = project(case)(case["states_NH"])
    expected_N = sampled_logp(logits_NV, case["token_N"], 0.8, 50, 0.95) * case["other_N"]
    assert len(seen) > 2 and sum(seen) == N
    torch.testing.assert_close(value_N["mine"], expected_N)


def test_no_tensor_of_all_places_and_tokens_is_made(case):
    states_NH = case["states_NH"].repeat(4, 1).requires_grad_()
    given = {name: case[name].repeat(4, 1) for name in ("reference_NH", "old_NH")}

    def update():
        tokens_N = case["token_N"].repeat(4)
        values = read_out(project(case), states_NH, tokens_N, READOUTS, given, vocab_size=V)
        sum(value.sum() for value in values.values()).backward()

    assert bench.peak_memory(update, torch.device("cpu")) < 0.9 * 4 * len(states_NH) * V
