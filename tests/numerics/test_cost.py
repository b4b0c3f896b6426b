"""What rollouts and updates cost: memory in tensors of N x V, no waits for the device, what approximations save."""

import dataclasses

import bench
import pytest
import torch
from checkpoints import PROMPTS
from toys import all_hidden, random_guide, rollout_of, steered

from rgrl.algo.estimators import draw_one_step, only_logp, weighted_sum
from rgrl.config import Config, GuidanceConfig, LoraConfig, ObjectiveConfig, RolloutConfig, RunConfig
from rgrl.models import add_lora, load_policy, readout
from rgrl.models.lora import adapter_parameters
from rgrl.rewards import RewardResult, load_classifier
from rgrl.rollout import generate
from rgrl.rollout.denoise import write_schedule
from rgrl.rollout.guidance import Guide, steer
from rgrl.rollout.sampling import draw_uniform, support_of
from rgrl.seeds import generators
from rgrl.step import Scored, gradient_term, prepare
from rgrl.trainer import release
from rgrl.types import PrefixCache, Prompts

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def reward(reward_dir):
    loaded = load_classifier(reward_dir)
    return loaded.bind(loaded.tokenizer, 4096)


# ------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize(("M", "tensors"), [(1, 0.5), (3, 2.7)])
def test_guidance_needs_two_moments_and_little_else(M, tensors):
    # Beside the logits themselves: with them at most 4 tensors of N x V in float32.
    N, V, D = 384, 30_000, 16
    rng = torch.Generator().manual_seed(0)
    table_VD, logits_NV = torch.randn(V, D, generator=rng), torch.randn(N, V, generator=rng)
    r, guide = RolloutConfig(), Guide(lambda x_BCD, *_: x_BCD.square().sum((1, 2)), table_VD, GuidanceConfig(steps=M))
    support = support_of(logits_NV, r.temperature, r.top_k, r.top_p)
    hidden, u_MN = all_hidden(4, N // 4), draw_uniform((M, N), rng)

    def run():
        steer(logits_NV, support, hidden, u_MN, guide, r, lambda ids: ids < 0)

    assert bench.peak_memory(run, CPU) < tensors * 4 * N * V


@pytest.fixture
def vocab(monkeypatch) -> int:
    """A quarter of Dream's vocabulary, with chunks that hold a quarter too: the same chunks of as many places."""
    monkeypatch.setattr(readout, "CPU_CHUNK", readout.CPU_CHUNK // 4)
    return 151_936 // 4


def test_the_update_projects_in_chunks_and_its_gradient_is_that_of_full_logits(vocab):
    tiny = bench.SHAPES["tiny"]
    narrow = tiny.policy | {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 32}
    shape = dataclasses.replace(tiny, vocab=vocab, policy=narrow)
    policy, _ = bench.make_models(shape, CPU)
    add_lora(policy, LoraConfig(r=4), seed=0)
    parameters = adapter_parameters(policy)
    rng = torch.Generator().manual_seed(2)
    for name, p in parameters.items():
        if "lora_B" in name:
            p.data.normal_(generator=rng)
    B, width, C = 8, 32, 32
    lengths_B = torch.arange(C - B + 1, C + 1)
    canvas_BL = torch.randint(0, 4000, (B, width + C), generator=torch.Generator().manual_seed(1))
    rollout = rollout_of(canvas_BL, torch.arange(C) < lengths_B[:, None])
    noise = draw_one_step(rollout, ObjectiveConfig(), generators(0, 0, range(B), "noise"))
    weight_BC = torch.randn(B, C, generator=rng)

    def gradient(logp):
        settings = policy.mask_id, ObjectiveConfig(), torch.ones(B)
        (weight_BC * weighted_sum(only_logp(logp), rollout, noise, *settings)["logp"]).mean().backward()
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


def test_the_rewards_gradient_and_its_kl_take_less_than_a_third_of_the_canvas_logits(vocab):
    tiny = bench.SHAPES["tiny"]
    narrow = tiny.policy | {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 32}
    B, width, C = 8, 32, 32
    sizes = {"vocab": vocab, "policy": narrow, "rows": B, "prompt": width, "completion": C, "steps": C}
    work = bench.Workload(dataclasses.replace(tiny, **sizes), CPU)
    run = bench.Steps(work).runs["none + gradient"]
    run = dataclasses.replace(run, config=dataclasses.replace(run.config, objective=ObjectiveConfig(weight=0.0)))
    rng = torch.Generator().manual_seed(2)
    prompts = run.stream.batch(0, 0).repeat(4)
    canvas_BL = torch.cat([policy_ids(work, prompts), torch.randint(0, 4000, (B, C), generator=rng)], 1)
    step_BC = torch.rand(B, C, generator=rng).argsort(1)
    rollout = rollout_of(canvas_BL, torch.ones(B, C, dtype=torch.bool), step_BC=step_BC)
    nothing_B = torch.zeros(B)
    scored = Scored(prompts, rollout, [""] * B, RewardResult(nothing_B, {}), nothing_B, {})

    def update():
        batch = prepare(run, scored, 0)
        batch.step_UKB = torch.zeros_like(batch.step_UKB)  # all places hidden: the most there can be
        assert gradient_term(run, batch, 0, 0).gradient.abs().max() > 1e-6

    assert bench.peak_memory(update, CPU) < 4 * B * (width + C) * sizes["vocab"] / 3


def policy_ids(work, prompts):
    """The prompts' tokens, padded on the left."""
    return work.policy.encode(prompts.inputs)[0]


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


def test_a_filled_prefix_gives_the_logits_of_the_whole_canvas(policy):
    # Nothing has changed since the pass over the whole canvas, so the cache is exact.
    prompt_BL, attention_BL = policy.encode(PROMPTS[:3])
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
        canvas_BL[:, -1] = 5  # after the prefix, so it counts
        changed_NV = policy.logits(canvas_BL, attention_BL, at_BL, prefix)
    assert (changed_NV - whole_NV)[:, :4000].abs().max() > 1e-3


def test_blocks_are_written_from_left_to_right_and_spare_the_prompt(dream_dir):
    policy, lengths = load_policy(dream_dir), []
    policy.causal_lm.model.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    rollout = generate(policy, PROMPTS[:4], RolloutConfig(max_completion_length=8, steps=8, block_length=4))
    assert (rollout.unmask_step_BC[:, :4] < 4).all() and (rollout.unmask_step_BC[:, 4:] >= 4).all()
    whole = rollout.canvas_BL.shape[1]
    # The first two passes and the first of the second block are whole; the others begin a token before the block.
    assert lengths[:5] in ([whole, 9, 9, 9, whole], [whole, whole, 9, 9, whole])
    assert set(lengths[5:]) == {5}
    assert rollout.policy_logp_BC[rollout.completion_mask_BC].isfinite().all()


def test_blocks_without_a_cache_read_the_whole_canvas_at_every_step(dream_dir):
    policy, lengths = load_policy(dream_dir), []
    policy.causal_lm.model.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    config = RolloutConfig(max_completion_length=8, steps=8, block_length=4, block_cache=False)
    rollout = generate(policy, PROMPTS[:4], config)
    assert (rollout.unmask_step_BC[:, :4] < 4).all() and (rollout.unmask_step_BC[:, 4:] >= 4).all()
    assert 4 < len(lengths) <= 8 and set(lengths) == {rollout.canvas_BL.shape[1]}


@pytest.mark.parametrize(("C", "T", "block"), [(8, 8, 0), (8, 3, 0), (8, 8, 4), (12, 5, 4), (6, 6, 1)])
def test_the_schedule_writes_every_place_once(C, T, block):
    plan = write_schedule(C, T, block)
    assert len(plan) == T and sum(window.commit for window in plan) == C
    hidden = dict.fromkeys(range(0, C, block or C), block or C)
    for window in plan:
        assert window.end - window.first == (block or C) and window.hidden == hidden[window.first]
        hidden[window.first] -= window.commit
    assert set(hidden.values()) == {0}


def test_guidance_every_k_th_step_calls_the_reward_model_less_often(dream_dir, reward):
    calls = []
    handle = reward.model.model.register_forward_pre_hook(lambda *_: calls.append(1))
    config, guidance = RolloutConfig(max_completion_length=8, steps=8), reward.guidance(GuidanceConfig(every=3))
    rollout = generate(load_policy(dream_dir), PROMPTS[:4], config, guidance=guidance)
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
    V, N = 60, 10
    logits_NV = 2 * torch.randn(N, V, generator=torch.Generator().manual_seed(0)).double()
    logits_NV[:, 7] = float("-inf")
    guides = [random_guide(V, GuidanceConfig(kind, M, top_n=n), dtype=torch.float64) for n in (0, V - 1)]
    all_NV, named_NV = (steered(logits_NV, all_hidden(2, 5), guide, RolloutConfig())[0] for guide in guides)
    torch.testing.assert_close(all_NV, named_NV, rtol=0, atol=1e-6)
    assert (all_NV - logits_NV).nan_to_num(0.0).abs().max() > 0.3


def test_guiding_few_tokens_leaves_the_others_alone(reward):
    logits_NV = torch.randn(8, 4096, generator=torch.Generator().manual_seed(0))
    guide = reward.guidance(GuidanceConfig(top_n=5)).guide(Prompts(PROMPTS[:2], [{}, {}]))
    moved_NV = steered(logits_NV, all_hidden(2, 4), guide, RolloutConfig())[0] != logits_NV
    assert (moved_NV.sum(1) <= 5).all() and moved_NV.any()
    best_N5 = logits_NV.topk(5).indices
    assert all(v in best_N5[n] for n, v in moved_NV.nonzero().tolist())


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
