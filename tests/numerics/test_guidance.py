"""Guidance against a slow version of the method: loops over steps, rows and positions, one row a forward pass."""

import math

import pytest
import torch
from checkpoints import write_reward
from toys import all_hidden, steered

from rgrl.config import GuidanceConfig, RolloutConfig
from rgrl.rewards import load_classifier
from rgrl.rollout.guidance import Guide, Hidden, normalised_entropy, shown_to_reward
from rgrl.rollout.sampling import draw_uniform, largest, support_of
from rgrl.types import Prompts

V, END = 40, 7
# Ends every turn with a token; the tiny reward model's own template ends none.
TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|endoftext|>{% endfor %}"
TEXTS = ["this movie", "the plot of this film is, as a thriller,", "it"]


def is_end(ids):
    return ids == END


@pytest.fixture(scope="module", params=[None, TEMPLATE], ids=["no ending", "ending"])
def reward(request, tmp_path_factory):
    # Adam divides a gradient by its own size and so magnifies rounding: float64 throughout, also in the
    # normalisation layers, where transformers' own go down to float32.
    loaded = load_classifier(write_reward(tmp_path_factory.mktemp("r"), template=request.param)).double()
    for parent in list(loaded.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ == "Qwen3RMSNorm":
                exact = torch.nn.RMSNorm(child.weight.shape, eps=child.variance_epsilon, dtype=torch.float64)
                exact.weight = child.weight
                setattr(parent, name, exact)
    return loaded


def canvas():
    """Three rows with different numbers of hidden positions; row 1 has an end token between hidden ones."""
    completion_BC = torch.tensor([[3, 0, 0, 11, 0, 0], [0, 5, 0, END, 0, 9], [0, 0, 0, 0, 0, 0]])
    masked_BC = torch.tensor([[0, 1, 1, 0, 1, 1], [1, 0, 1, 0, 1, 0], [1, 1, 1, 1, 1, 1]]).bool()
    logits_NV = 3 * torch.randn(int(masked_BC.sum()), V, generator=torch.Generator().manual_seed(5)).double()
    logits_NV[:, 13] = float("-inf")  # as the mask token
    logits_NV[2, END] = 20.0  # row 0 ends at its third hidden position
    logits_NV[9, END] = logits_NV[9].max() + 0.1  # row 2 ends at its third too, or not any more after a step
    completion_BC[masked_BC] = 4093  # beyond the table: a hidden token must never be looked up
    return logits_NV, Hidden(completion_BC, masked_BC.flatten().nonzero()[:, 0], torch.arange(3))


def uniform(*shape):
    return draw_uniform(shape, torch.Generator().manual_seed(1))


def guide_of(reward, config, attend_eos=False, **settings):
    embedding_VD = reward.model.get_input_embeddings().weight[:V].detach()
    return Guide(reward.for_prompts(Prompts(TEXTS, [{}] * 3)), embedding_VD, config, attend_eos, **settings)


@pytest.mark.parametrize("M", [1, 3])
def test_a_gradient_that_is_not_finite_steers_nothing_and_is_counted(M):
    logits_NV, hidden = canvas()
    table_VD = torch.randn(V, 5, generator=torch.Generator().manual_seed(0)).double()

    def reward(response_BCD, attention_BC, rows_B):
        # Of row 0 the gradient overflows at its first hidden place.
        return response_BCD.sum((1, 2)) + 1e308 * response_BCD[:, 1, 0] * (rows_B == 0) * 1e308

    guide = Guide(reward, table_VD, GuidanceConfig(steps=M, kind="expectation"))
    guided_NV, broken = steered(logits_NV, hidden, guide, RolloutConfig(temperature=1.0, top_k=0, top_p=1.0), is_end)
    assert broken == M and torch.equal(guided_NV[0], logits_NV[0])
    assert not guided_NV.isnan().any() and (guided_NV[1:] != logits_NV[1:]).any(1).all()


def slow_truncate(logits_V, top_k, top_p):
    """By a full sort: the k largest, then the shortest prefix of those that holds top_p."""
    order = sorted(range(len(logits_V)), key=lambda v: -logits_V[v].item())
    order = order[: top_k or len(order)]
    weights = [math.exp(logits_V[v].item() - logits_V[order[0]].item()) for v in order]
    kept, mass = [], 0.0
    for v, w in zip(order, weights, strict=True):
        if mass >= top_p * sum(weights):
            break
        kept.append(v)
        mass += w
    out = torch.full_like(logits_V, float("-inf"))
    out[kept] = logits_V[kept]
    return out


def slow_reward(reward, text, response, attend_eos):
    """One row, uncached, by transformers' own classifier; `response` is a list of (likely token, embedding)."""
    before, after = reward.template.around(text)
    table = reward.model.get_input_embeddings().weight
    shown = []
    for token, embedding in response:
        if token == END:
            if attend_eos:
                shown.append(embedding)
            break
        shown.append(embedding)
    # Where padding ends the template too, transformers reads the last token that is none, which sees no later one.
    ending = [i for i in after.ids if i != reward.pad_id]
    assert after.ids == ending + [reward.pad_id] * (len(after.ids) - len(ending))
    embeds = [*(table[i] for i in before.ids), *shown, *(table[i] for i in ending)]
    return reward.model(inputs_embeds=torch.stack(embeds)[None]).logits[0, 0]


def slow_guide(logits_NV, hidden, guide, reward, rollout, u_MN):
    """Section 1 of the method, position by position, with torch's own Adam."""
    kind, M, eta = guide.config.kind, guide.config.steps, guide.config.eta
    completion_BC, masked_BC = hidden.completion_BC, hidden.completion_BC == 4093
    E, tau = reward.model.get_input_embeddings().weight, rollout.temperature
    phi = [torch.nn.Parameter(row.clone()) for row in logits_NV]
    adam = torch.optim.Adam(phi, lr=eta, betas=(0.9, 0.999), eps=1e-8, maximize=True)
    for m in range(M):
        for p in phi:
            p.grad = torch.zeros_like(p)  # not None: the state of a position without a gradient ages all the same
        total, n = 0.0, 0
        for b in range(len(completion_BC)):
            response = []
            for c in range(completion_BC.shape[1]):
                if not masked_BC[b, c]:
                    token = completion_BC[b, c].item()
                    response.append((token, E[token]))
                    continue
                p_V = torch.exp(phi[n] / tau) / torch.exp(phi[n] / tau).sum()
                soft_D = sum(p_V[v] * E[v] for v in range(V))
                if kind == "expectation":
                    seen_D = soft_D
                else:
                    support_V = slow_truncate((phi[n] / tau).detach(), rollout.top_k, rollout.top_p)
                    order = sorted(range(V), key=lambda v: -support_V[v].item())
                    cdf_V = support_V[order].softmax(0).cumsum(0)
                    hard_D = E[order[int((cdf_V <= u_MN[m, n]).sum())]]
                    q = torch.exp(phi[n].detach()) / torch.exp(phi[n].detach()).sum()
                    entropy = -sum(x * math.log(x) for x in q.tolist() if x > 0)
                    w = entropy / math.log(V) if kind == "entrgi" else 1.0
                    seen_D = soft_D + (w * (hard_D - soft_D)).detach()
                response.append((phi[n].argmax().item(), seen_D))
                n += 1
            total = total + slow_reward(reward, TEXTS[b], response, guide.attend_eos)
        total.backward()
        adam.step()
    return torch.stack([p.detach() for p in phi])


@pytest.mark.parametrize("attend_eos", [False, True])
@pytest.mark.parametrize("M", [1, 3])
@pytest.mark.parametrize("kind", ["expectation", "aps", "entrgi"])
def test_guidance_equals_the_slow_loop(kind, M, attend_eos, reward):
    logits_NV, hidden = canvas()
    rollout, u_MN = RolloutConfig(temperature=0.8, top_k=12, top_p=0.9), uniform(M, len(logits_NV))
    guide = guide_of(reward, GuidanceConfig(kind=kind, steps=M, eta=0.5), attend_eos)
    fast_NV, _ = steered(logits_NV, hidden, guide, rollout, is_end, u_MN)
    slow_NV = slow_guide(logits_NV, hidden, guide, reward, rollout, u_MN)
    torch.testing.assert_close(fast_NV, slow_NV, rtol=0, atol=1e-5)
    assert torch.isneginf(fast_NV[:, 13]).all()
    assert all(p.grad is None for p in reward.model.parameters())
    # What the reward cannot see is not steered: row 0 past its likely end, row 1 past its known one.
    moved_N = (fast_NV - logits_NV).nan_to_num(0.0).abs().amax(1)
    assert moved_N[3] == 0 and moved_N[6] == 0
    assert (moved_N[2] > 0) == attend_eos
    assert (moved_N[[0, 1, 4, 5, 7, 8]] > 0.1).all()


@pytest.mark.parametrize(("weight", "kind"), [(0.0, "expectation"), (1.0, "aps")])
def test_entropy_weight_of_0_and_1_gives_expectation_and_aps(weight, kind, reward):
    logits_NV, hidden = canvas()
    fixed = {"weight": lambda phi_NV, V: torch.full_like(phi_NV[:, 0], weight)}
    guides = [guide_of(reward, GuidanceConfig(kind=name, steps=2), **fixed) for name in ("entrgi", kind)]
    entrgi_NV, other_NV = (steered(logits_NV, hidden, guide, RolloutConfig(), is_end)[0] for guide in guides)
    torch.testing.assert_close(entrgi_NV, other_NV, rtol=0, atol=1e-5)
    assert (other_NV - logits_NV).nan_to_num(0.0).abs().max() > 0.5


@pytest.mark.parametrize("M", [1, 3])
def test_small_expectation_step_never_lowers_a_linear_reward(M):
    rng = torch.Generator().manual_seed(0)
    for _ in range(20):
        embedding_VD, direction_D = torch.randn(V, 6, generator=rng), torch.randn(6, generator=rng)
        logits_NV = 2 * torch.randn(8, V, generator=rng)
        config = GuidanceConfig(kind="expectation", steps=M, eta=0.01)
        guide = Guide(lambda x_BCD, a_BC, rows_B, w=direction_D: (x_BCD @ w).sum(1), embedding_VD, config)
        guided_NV, _ = steered(logits_NV, all_hidden(2, 4), guide, RolloutConfig(temperature=0.7), is_end)
        value_V = embedding_VD @ direction_D
        before_N, after_N = ((x / 0.7).softmax(-1) @ value_V for x in (logits_NV, guided_NV))
        assert (after_N > before_N).all()


def test_first_step_moves_every_logit_the_reward_sees_by_eta(reward):
    # Adam's first step is eta * g / (|g| + 1e-8), whatever the size of g.
    logits_NV, hidden = canvas()
    guide = guide_of(reward, GuidanceConfig(kind="expectation", steps=1, eta=0.25))
    moved = (steered(logits_NV, hidden, guide, RolloutConfig(temperature=2.0), is_end)[0] - logits_NV)[0].abs()
    assert (moved[torch.arange(V) != 13] - 0.25).abs().max() < 0.01


def test_entropy_weight_is_1_for_uniform_and_0_for_one_hot():
    one_hot_V = torch.full((9,), float("-inf"))
    one_hot_V[4] = 2.0
    half_V = torch.full((9,), float("-inf"))
    half_V[[1, 2, 3]] = 0.0
    w_N = normalised_entropy(torch.stack([torch.full((9,), 3.0), one_hot_V, half_V]), 9)
    torch.testing.assert_close(w_N, torch.tensor([1.0, 0.0, 0.5]))


@pytest.mark.parametrize("top_k", [0, 1, 3, 8, 15, 99])
@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.75, 0.95, 1.0])
def test_truncation_equals_sorting(top_k, top_p):
    logits_NV = 2 * torch.randn(12, 15, generator=torch.Generator().manual_seed(3)).double()
    logits_NV[:6, 4] = float("-inf")  # as the mask token
    expected_NV = torch.stack([slow_truncate(row / 0.7, top_k, top_p) for row in logits_NV]).log_softmax(-1)
    support = support_of(logits_NV, 0.7, top_k, top_p)
    for v in range(15):
        logp_N = support.logp(torch.full((12,), v))
        torch.testing.assert_close(logp_N, expected_NV[:, v], rtol=0, atol=1e-6)
    assert torch.equal(support.best(), expected_NV.argmax(-1))


@pytest.mark.parametrize("V", [300, 64 * 40, 64 * 40 + 1, 64 * 40 + 63])  # one search, and in blocks with a rest
@pytest.mark.parametrize("k", [1, 7, 10])
def test_largest_equals_topk(V, k):
    x_NV = torch.randn(50, V, generator=torch.Generator().manual_seed(k))
    x_NV[0, -k:] += 10  # in the rest, where there is one
    x_NV[1, : V - 1] = float("-inf")
    values_NK, index_NK = largest(x_NV, k)
    assert torch.equal(values_NK, x_NV.topk(k, dim=-1).values)
    assert torch.equal(x_NV.gather(1, index_NK), values_NK)
    assert all(len(set(row)) == k for row in index_NK.tolist())


@pytest.mark.parametrize("top_k", [0, 5])
def test_sampling_frequencies_follow_the_softmax(top_k):
    logits_V = torch.tensor([2.0, 0.0, -1.0, 1.5, float("-inf"), -3.0])
    n = 40_000
    support = support_of(logits_V.expand(n, -1), 1.0, top_k, 1.0)
    drawn_N = support.token(support.pick(uniform(n)))
    fraction_V = torch.bincount(drawn_N, minlength=6) / n
    p_V = logits_V.softmax(0)
    # Five standard deviations of a fraction of n draws.
    assert ((fraction_V - p_V).abs() <= 5 * (p_V * (1 - p_V) / n).sqrt()).all()
    assert fraction_V[4] == 0 and fraction_V[5] > 0


def test_the_outermost_quantiles_hit_possible_tokens():
    logits_NV = torch.randn(200, 3000, generator=torch.Generator().manual_seed(0)) * 4
    logits_NV[:, ::2] = float("-inf")
    for top_k, top_p in ((0, 1.0), (0, 0.9), (50, 0.95)):
        support = support_of(logits_NV, 1.0, top_k, top_p)
        for u in (1e-7, 1 - 1e-6):
            token_N = support.token(support.pick(torch.full((200,), u)))
            assert support.logp(token_N).isfinite().all()


def test_reward_sees_tokens_before_the_first_end_token():
    tokens_BC = torch.tensor([[1, END, 2, END], [END, 1, 1, 1], [1, 2, 3, 4]])
    without = [[True, False, False, False], [False] * 4, [True] * 4]
    with_it = [[True, True, False, False], [True, False, False, False], [True] * 4]
    assert shown_to_reward(tokens_BC, is_end, False).tolist() == without
    assert shown_to_reward(tokens_BC, is_end, True).tolist() == with_it
