"""What rollouts and updates may cost: memory in tensors of N x V, no waiting for the device, and what is spared."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from conftest import PROMPTS, write_reward

from rgrl.config import Config, GuidanceConfig, LoraConfig, ModelConfig, ObjectiveConfig, RolloutConfig, RunConfig
from rgrl.denoise import RolloutNoise, denoise, write_schedule
from rgrl.guidance import Guide, guide
from rgrl.logprobs import draw_one_step, weighted_sum
from rgrl.models import add_lora, load_policy
from rgrl.models.lora import adapter_parameters
from rgrl.rewards import load_classifier
from rgrl.sampling import draw_uniform, support_of
from rgrl.seeds import generators
from rgrl.trainer import release
from rgrl.types import PrefixCache, Prompts, Rollout

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))
import bench

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["dream", "llada"])
def policy(request):
    return load_policy(ModelConfig(path=str(request.getfixturevalue(f"{request.param}_dir"))))


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    loaded = load_classifier(str(write_reward(tmp_path_factory.mktemp("reward"))), "cpu")
    loaded.bind(loaded.tokenizer, 4096, "compose")
    return loaded


def roll_out(policy, config, reward=None, guidance=None, texts=PROMPTS[:4], seed=0):
    prompt_BL, attention_BL = policy.encode_prompts(texts, 16)
    prompts = Prompts(texts, [{} for _ in texts])
    guided = Guide(reward.guide_for(prompts), reward.embedding_VD, guidance) if guidance is not None else None
    M = guidance.steps if guidance is not None else 0
    noise = RolloutNoise.draw(
        generators(seed, 0, range(len(texts)), "t"), config.steps, config.max_completion_length, M
    )
    return denoise(policy.logits, prompt_BL, attention_BL, policy.mask_id, policy.is_end, config, noise, guided)


# ------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize(("M", "tensors"), [(1, 0.5), (3, 2.7)])
def test_guidance_needs_two_moments_and_little_else(M, tensors):
    # Beside the logits themselves: with them at most 4 tensors of N x V in float32.
    N, V, D = 384, 30_000, 16
    rng = torch.Generator().manual_seed(0)
    table_VD, logits_NV = torch.randn(V, D, generator=rng), torch.randn(N, V, generator=rng)
    rollout = RolloutConfig()
    config = GuidanceConfig(steps=M)
    guidance = Guide(lambda x_BCD, a_BC, rows_B: x_BCD.square().sum((1, 2)), table_VD, config)
    support = support_of(logits_NV, rollout.temperature, rollout.top_k, rollout.top_p)
    nothing_BC, hidden_N = torch.zeros(4, N // 4, dtype=torch.long), torch.arange(N)
    u_MN = draw_uniform((M, N), rng)

    def run():
        guide(logits_NV, support, nothing_BC, hidden_N, torch.arange(4), guidance, rollout, lambda ids: ids < 0, u_MN)

    assert bench.peak_memory(run, CPU) < tensors * 4 * N * V


def random_rollout(policy, B, width, C):
    rng = torch.Generator().manual_seed(1)
    canvas_BL = torch.randint(0, 4000, (B, width + C), generator=rng)
    mask_BC = torch.arange(C) < torch.arange(C - B + 1, C + 1)[:, None]
    nothing_BC = torch.zeros(B, C)
    return Rollout(
        canvas_BL, torch.ones_like(canvas_BL, dtype=torch.bool), mask_BC, nothing_BC.long(), nothing_BC, nothing_BC
    )


def test_the_update_projects_in_chunks_and_its_gradient_is_that_of_full_logits():
    shape = dataclasses.replace(
        bench.SHAPES["tiny"], vocab=151_936, policy=bench._dream(16, 1, 2, 2, 32), reward=bench._qwen3(8, 1, 1, 1, 8, 8)
    )
    policy, _ = bench.make_models(shape, CPU)
    add_lora(policy, LoraConfig(r=4), seed=0)
    parameters = adapter_parameters(policy)
    rng = torch.Generator().manual_seed(2)
    for name, p in parameters.items():
        if "lora_B" in name:
            p.data.normal_(generator=rng)
    B, width, C = 8, 32, 32
    rollout = random_rollout(policy, B, width, C)
    noise = draw_one_step(rollout, ObjectiveConfig(), generators(0, 0, range(B), "noise"))
    weight_BC = torch.randn(B, C, generator=rng)

    def gradient(logp):
        (
            weight_BC * weighted_sum(logp, rollout, noise, policy.mask_id, ObjectiveConfig(), torch.ones(B))
        ).mean().backward()
        kept = {name: p.grad for name, p in parameters.items()}
        policy.zero_grad(set_to_none=True)
        return kept

    def full(canvas_BL, attention_BL, at_BL, token_N):
        return policy.logits(canvas_BL, attention_BL).log_softmax(-1)[at_BL].gather(1, token_N[:, None])[:, 0]

    assert bench.peak_memory(lambda: gradient(policy.logp), CPU) < 4 * B * (width + C) * shape.vocab / 4
    chunked, whole = gradient(policy.logp), gradient(full)
    assert max(g.abs().max() for g in whole.values()) > 0.01
    for name, g in whole.items():
        torch.testing.assert_close(chunked[name], g, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------- waiting


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", ["none", "expectation", "aps", "entrgi"])
def test_the_loop_never_waits_for_the_gpu(kind):
    work = bench.Workload(bench.SHAPES["tiny"], torch.device("cuda"))
    work.rollout(kind, 1)  # what is set up once may wait
    waits = []
    logits = work.policy.logits

    def watched(*arguments):
        if not waits:  # from the first step on
            torch.cuda.set_sync_debug_mode("error")
        waits.append(1)
        return logits(*arguments)

    work.policy.logits = watched
    try:
        work.rollout(kind, 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(waits) == work.shape.steps


# ------------------------------------------------------------------------------------------ approximations


def counted(policy):
    """The policy's logits and, for each reading, how many tokens it read."""
    read = []
    policy.causal_lm.model.register_forward_pre_hook(lambda module, args: read.append(args[0].shape[1]))
    return read


def test_a_filled_prefix_gives_the_logits_of_the_whole_canvas(policy):
    # Nothing has changed since the canvas was read whole, so what was kept is exact.
    prompt_BL, attention_BL = policy.encode_prompts(PROMPTS[:3], 16)
    width = prompt_BL.shape[1]
    canvas_BL = torch.cat([prompt_BL, torch.full((3, 6), policy.mask_id)], 1)
    attention_BL = torch.cat([attention_BL, torch.ones(3, 6, dtype=torch.bool)], 1)
    assert not attention_BL.all()  # padded
    at_BL = torch.zeros_like(attention_BL)
    at_BL[:, width:] = True
    prefix = PrefixCache(width - 1)
    with torch.no_grad():
        whole_NV = policy.logits(canvas_BL, attention_BL, at_BL)
        for _ in range(3):
            torch.testing.assert_close(policy.logits(canvas_BL, attention_BL, at_BL, prefix), whole_NV)
        canvas_BL[:, -1] = 5  # read anew, of course
        changed_NV = policy.logits(canvas_BL, attention_BL, at_BL, prefix)
    assert (changed_NV - whole_NV)[:, :4000].abs().max() > 1e-3


def test_blocks_are_written_from_left_to_right_and_spare_the_prompt(dream_dir):
    policy = load_policy(ModelConfig(path=str(dream_dir)))
    read = counted(policy)
    config = RolloutConfig(max_completion_length=8, steps=8, block_length=4)
    rollout = roll_out(policy, config)
    assert (rollout.unmask_step_BC[:, :4] < 4).all() and (rollout.unmask_step_BC[:, 4:] >= 4).all()
    width = rollout.canvas_BL.shape[1] - 8
    # The first two readings and the first of the second block are whole; the others begin a token before the block.
    assert read[:5] == [width + 8, *[9] * 3, width + 8] or read[:5] == [width + 8, width + 8, 9, 9, width + 8]
    assert set(read[5:]) == {5}
    assert rollout.policy_logp_BC[rollout.completion_mask_BC].isfinite().all()


@pytest.mark.parametrize("settings", [(8, 8, 0), (8, 3, 0), (8, 8, 4), (12, 5, 4), (6, 6, 1)])
def test_the_schedule_writes_every_place_once(settings):
    C, T, block = settings
    plan = write_schedule(C, T, block)
    assert len(plan) == T and sum(k for *_, k in plan) == C
    hidden = dict.fromkeys(range(0, C, block or C), block or C)
    for first, end, left, k in plan:
        assert end - first == (block or C) and left == hidden[first]
        hidden[first] -= k
    assert set(hidden.values()) == {0}


def test_guidance_every_k_th_step_reads_the_reward_model_less_often(dream_dir, reward):
    policy = load_policy(ModelConfig(path=str(dream_dir)))
    config = RolloutConfig(max_completion_length=8, steps=8)
    calls = []
    handle = reward.model.model.register_forward_pre_hook(lambda *_: calls.append(1))
    rollout = roll_out(policy, config, reward, GuidanceConfig(every=3))
    handle.remove()
    assert len(calls) == 1 + 3  # the prompts, and steps 0, 3 and 6
    unguided_BC = rollout.unmask_step_BC % 3 != 0
    assert torch.equal(rollout.behaviour_logp_BC[unguided_BC], rollout.policy_logp_BC[unguided_BC])
    guided = rollout.completion_mask_BC & ~unguided_BC
    assert (rollout.behaviour_logp_BC != rollout.policy_logp_BC)[guided].any()


@pytest.mark.parametrize("M", [1, 3])
@pytest.mark.parametrize("kind", ["expectation", "aps", "entrgi"])
def test_guiding_all_tokens_by_name_equals_guiding_them_in_place(kind, M):
    # With n = V - 1 only the impossible token is left out, so nothing is approximated but the order of the columns.
    rng = torch.Generator().manual_seed(0)
    V, D, N = 60, 6, 10
    table_VD, logits_NV = torch.randn(V, D, generator=rng).double(), 2 * torch.randn(N, V, generator=rng).double()
    logits_NV[:, 7] = float("-inf")
    w_D = torch.randn(D, generator=rng).double()
    rollout, u_MN = RolloutConfig(), draw_uniform((M, N), rng)
    guided = []
    for top_n in (0, V - 1):
        config = GuidanceConfig(kind=kind, steps=M, top_n=top_n)
        guidance = Guide(lambda x_BCD, a_BC, rows_B: torch.tanh(x_BCD @ w_D).sum(1), table_VD, config)
        phi_NV = logits_NV.clone()
        support = support_of(phi_NV, rollout.temperature, rollout.top_k, rollout.top_p)
        hidden_N, rows_B = torch.arange(N), torch.arange(2)
        nothing_BC = torch.zeros(2, 5, dtype=torch.long)
        guide(phi_NV, support, nothing_BC, hidden_N, rows_B, guidance, rollout, lambda ids: ids < 0, u_MN)
        guided.append(phi_NV)
    torch.testing.assert_close(guided[0], guided[1], rtol=0, atol=1e-6)
    assert (guided[0] - logits_NV).nan_to_num(0.0).abs().max() > 0.3


def test_guiding_few_tokens_leaves_the_others_alone(dream_dir, reward):
    config = GuidanceConfig(top_n=5)
    rng = torch.Generator().manual_seed(0)
    logits_NV = torch.randn(8, 4096, generator=rng)
    before_NV = logits_NV.clone()
    rollout = RolloutConfig()
    prompts = Prompts(PROMPTS[:2], [{}, {}])
    guidance = Guide(reward.guide_for(prompts), reward.embedding_VD, config)
    support = support_of(logits_NV, rollout.temperature, rollout.top_k, rollout.top_p)
    nothing_BC, hidden_N, rows_B = torch.zeros(2, 4, dtype=torch.long), torch.arange(8), torch.arange(2)
    guide(logits_NV, support, nothing_BC, hidden_N, rows_B, guidance, rollout, lambda ids: ids < 0, torch.rand(1, 8))
    assert ((logits_NV != before_NV).sum(1) <= 5).all() and (logits_NV != before_NV).any()
    moved = (logits_NV != before_NV).nonzero()
    best_N5 = before_NV.topk(5).indices
    assert all(v in best_N5[n] for n, v in moved.tolist())


# -------------------------------------------------------------------------------------------------- GPU memory


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cached_memory_goes_back_to_the_gpu_when_the_settings_say_so():
    for policy, given_back in (("never", ()), ("step", ("step",)), ("phase", ("phase", "step"))):
        for end_of in ("phase", "step"):
            torch.empty(2**28, device="cuda", dtype=torch.uint8)  # freed at once, and cached
            before = torch.cuda.memory_reserved()
            release(Config(run=RunConfig(empty_cache=policy)), end_of)
            assert (torch.cuda.memory_reserved() < before) == (end_of in given_back), (policy, end_of)
