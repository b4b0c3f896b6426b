"""Time rollouts and whole steps against the floor: the network calls that no implementation can leave out.

    python recipes/bench.py --shape small
    python recipes/bench.py --shape small-wide --steps 4 --rounds 3 --json bench.json
    python recipes/bench.py --shape small --whole-steps

With `--whole-steps` it times training steps (rollout, scores, one update), guided or not, with the reward's own
gradient in the update or without it, each against its own floor and against the step that has neither.
Random weights, one process. The variants take turns within a round, so that whatever else the machine does falls on
all of them; a ratio is the median over rounds of rollout seconds by the same round's floor.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForSequenceClassification

from rgrl.algo import resolve_algorithm
from rgrl.algo.estimators import draw_one_step, only_logp, weighted_sum
from rgrl.config import (
    Config,
    GradientConfig,
    GuidanceConfig,
    LoraConfig,
    ObjectiveConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
)
from rgrl.data import PromptStream
from rgrl.metrics import Clock
from rgrl.models import add_lora
from rgrl.models.families import find_family
from rgrl.models.lora import adapter_parameters
from rgrl.models.policy import Policy
from rgrl.models.text import count_positions, pad_left
from rgrl.rewards import Rewards
from rgrl.rewards.classifier import ClassifierReward
from rgrl.rollout import generate
from rgrl.rollout.denoise import commit_schedule
from rgrl.seeds import generators
from rgrl.setup import Run, load_readouts
from rgrl.step import rollout_step, update_step
from rgrl.types import Prompts, Rollout


@dataclass(frozen=True)
class Shape:
    """One workload: sizes of the policy and of the reward model, rows, tokens and steps."""

    vocab: int  # V, tokens of both models
    family: str  # its quirks and classes
    policy: dict[str, int]  # fields of the family's own config.json
    reward: dict[str, int]  # fields of a Qwen3 config
    rows: int = 8
    prompt: int = 64
    completion: int = 64
    steps: int = 32
    dtype: str = "float32"


def _dream(width: int, layers: int, heads: int, kv: int, mlp: int) -> dict[str, int]:
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "intermediate_size": mlp,
    }


def _qwen3(width: int, layers: int, heads: int, kv: int, mlp: int, head: int) -> dict[str, int]:
    return _dream(width, layers, heads, kv, mlp) | {"head_dim": head}


_SMALL = {"policy": _dream(256, 4, 4, 4, 1024), "reward": _qwen3(256, 4, 4, 4, 1024, 64), "family": "dream"}
_LARGE = {"prompt": 100, "completion": 128, "steps": 128, "dtype": "bfloat16"}
_SKYWORK_06 = _qwen3(1024, 28, 16, 8, 3072, 128)
_SKYWORK_17 = _qwen3(2048, 28, 16, 8, 6144, 128)
_LLADA_8B = {"d_model": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 32, "mlp_hidden_size": 12288}
SHAPES = {
    "tiny": Shape(500, "dream", _dream(32, 2, 2, 2, 64), _qwen3(32, 2, 2, 2, 64, 16), 2, 6, 8, 4),
    "small": Shape(32_000, **_SMALL),
    "small-wide": Shape(151_936, **_SMALL),
    "dream-0.6b": Shape(151_936, "dream", _dream(3584, 28, 28, 4, 18944), _SKYWORK_06, **_LARGE),
    "dream-1.7b": Shape(151_936, "dream", _dream(3584, 28, 28, 4, 18944), _SKYWORK_17, **_LARGE),
    "llada-1.7b": Shape(126_464, "llada", _LLADA_8B, _SKYWORK_17, **_LARGE),
}


# ------------------------------------------------------------------------------------------- random models
def make_tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """V words `t0 t1 …`, the last two of them the mask and end-of-text."""
    table = {f"t{i}": i for i in range(vocab - 2)} | {"<mask>": vocab - 2, "<end>": vocab - 1}
    words = Tokenizer(models.WordLevel(table, unk_token="<end>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, mask_token="<mask>", eos_token="<end>")


def make_models(shape: Shape, device: torch.device) -> tuple[Policy, ClassifierReward]:
    """A policy and a reward model of the shape's sizes, random weights, made on the device."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer(shape.vocab)
    family = find_family(None, shape.family)
    ids = {"mask_token_id": shape.vocab - 2, "eos_token_id": shape.vocab - 1, "pad_token_id": shape.vocab - 1}
    sizes = {"vocab_size": shape.vocab, "embedding_size": shape.vocab, "rope_theta": 1e4, "rms_norm_eps": 1e-6} | ids
    config = family.make_config(sizes | {"max_position_embeddings": 512, "max_sequence_length": 512} | shape.policy)
    config.is_causal = False
    reward_config = Qwen3Config(vocab_size=shape.vocab, num_labels=1, pad_token_id=shape.vocab - 1, **shape.reward)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, shape.dtype))
    try:
        with device:
            causal_lm = family.model_class(config)
            classifier = Qwen3ForSequenceClassification(reward_config)
    finally:
        torch.set_default_dtype(before)
    policy = Policy(causal_lm, tokenizer, family, shape.vocab - 2, "random").requires_grad_(False).eval()
    reward = ClassifierReward(classifier, tokenizer, "random")
    reward.backend = "prefix_cached"  # as a checkpoint of this architecture is found to guide when it is loaded
    reward.bind(tokenizer, policy.vocab_size, "zero")
    return policy, reward


# ------------------------------------------------------------------------------------------------ workloads
class Workload:
    """The models, prompts and settings of one shape, and the functions that are timed."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.shape, self.device = shape, device
        self.policy, self.reward = make_models(shape, device)
        rng = torch.Generator().manual_seed(1)
        lengths = [shape.prompt - (i % 4) * (shape.prompt // 16) for i in range(shape.rows)]
        self.prompts = Prompts(
            [" ".join(f"t{j}" for j in torch.randint(shape.vocab - 2, (n,), generator=rng).tolist()) for n in lengths],
            [{} for _ in lengths],
        )
        rows = [self.policy.tokenizer(text)["input_ids"] for text in self.prompts.texts]
        self.prompt_BL, self.attention_BL = pad_left(rows, device)
        self.settings = RolloutConfig(
            max_completion_length=shape.completion, steps=shape.steps, temperature=0.9, top_p=0.95, top_k=50
        )

    @torch.no_grad()
    def floor(self, guidance_steps: int) -> None:
        """T bodies of the policy over the canvas, the vocabulary projection and one softmax of what is still hidden.

        With M = `guidance_steps` above 0 also, M times a step, the soft embeddings forward and backward and the reward
        model forward and backward over the response, its prefix cached.
        """
        shape, policy, reward = self.shape, self.policy, self.reward
        B, C = shape.rows, shape.completion
        canvas_BL = torch.cat([self.prompt_BL, torch.full((B, C), policy.mask_id, device=self.device)], 1)
        attention_BL = torch.cat([self.attention_BL, torch.ones(B, C, dtype=torch.bool, device=self.device)], 1)
        position_BL = count_positions(attention_BL)
        table_VD = reward.embedding_VD
        assert table_VD is not None
        session = reward.for_prompts(self.prompts) if guidance_steps else None
        attended_BC = torch.ones(B, C, dtype=torch.bool, device=self.device)
        rows_B = torch.arange(B, device=self.device)
        left = C
        for k in commit_schedule(C, shape.steps):
            states_BLH = policy.causal_lm.model(
                input_ids=canvas_BL, attention_mask=attention_BL.long(), position_ids=position_BL, use_cache=False
            ).last_hidden_state
            states_NH = states_BLH[:, -left:].reshape(B * left, -1)
            p_NV = F.linear(states_NH, policy.causal_lm.lm_head.weight[: policy.vocab_size]).float().softmax(-1)
            for _ in range(guidance_steps):
                soft_ND = p_NV.to(table_VD.dtype) @ table_VD
                response_BCD = table_VD.new_zeros(B, C, table_VD.shape[1])
                response_BCD[:, -left:] = soft_ND.view(B, left, -1)
                with torch.enable_grad():
                    response_BCD.requires_grad_()
                    (g_BCD,) = torch.autograd.grad(session(response_BCD, attended_BC, rows_B).sum(), response_BCD)
                _ = g_BCD[:, -left:].reshape(B * left, -1) @ table_VD.T
            left -= k

    def rollout(self, kind: str, guidance_steps: int) -> None:
        """A rollout as rgrl/step.py makes it, the reward model's prefix included."""
        guidance = None
        if kind != "none":
            guidance = self.reward.guidance(GuidanceConfig(kind=kind, steps=guidance_steps, eta=0.5))
        seeds = [torch.Generator().manual_seed(b) for b in range(self.shape.rows)]
        generate(self.policy, self.prompts, self.settings, seeds, guidance)

    def update(self) -> None:
        """Log-probabilities of random completions and the gradient of their mean, as a training step takes them."""
        if self.policy.peft_model is None:
            add_lora(self.policy, LoraConfig(), seed=0)
        B, C = self.shape.rows, self.shape.completion
        random_BC = torch.randint(self.shape.vocab - 2, (B, C), device=self.device)
        nothing_BC = torch.zeros(B, C, device=self.device)
        rollout = Rollout(
            torch.cat([self.prompt_BL, random_BC], 1),
            torch.cat([self.attention_BL, torch.ones_like(random_BC, dtype=torch.bool)], 1),
            torch.ones_like(random_BC, dtype=torch.bool),
            nothing_BC.long(),
            nothing_BC,
            nothing_BC,
        )
        noise = draw_one_step(rollout, ObjectiveConfig(), generators(0, 0, range(B), "noise"))
        values, mask_id = only_logp(self.policy.logp), self.policy.mask_id
        estimate = weighted_sum(values, rollout, noise, mask_id, ObjectiveConfig(), nothing_BC[:, 0])
        estimate["logp"].mean().backward()
        self.policy.zero_grad(set_to_none=True)

    def variants(self, guidance_steps: list[int]) -> dict[str, tuple[str, Callable[[], None]]]:
        """Name -> (name of its floor, function)."""
        result = {
            "floor M=0": ("floor M=0", lambda: self.floor(0)),
            "none": ("floor M=0", lambda: self.rollout("none", 0)),
        }
        for m in guidance_steps:
            floor = f"floor M={m}"
            result[floor] = (floor, lambda m=m: self.floor(m))
            for kind in ("expectation", "aps", "entrgi"):
                result[f"{kind} M={m}"] = (floor, lambda kind=kind, m=m: self.rollout(kind, m))
        return result


class Steps:
    """Whole training steps of a workload, with LoRA and a KL to the base, and the floor of each.

    Named by what guides the rollouts, with `+ gradient` where the reward's own gradient is a term of the update.
    """

    KINDS = ("none", "none + gradient", "entrgi", "entrgi + gradient")

    def __init__(self, work: Workload) -> None:
        self.work = work
        if work.policy.peft_model is None:
            add_lora(work.policy, LoraConfig(), seed=0)
        self.runs = {name: self._run(name) for name in self.KINDS}

    def _run(self, name: str) -> Run:
        work, (kind, *term) = self.work, name.split(" + ")
        G = min(4, work.shape.rows)
        config = Config(
            rollout=replace(work.settings, num_generations=G),
            reward=RewardConfig(name=work.reward.name),
            guidance=GuidanceConfig(kind=kind),
            objective=ObjectiveConfig(beta=0.1),
            gradient=GradientConfig(weight=float(len(term))),
            run=RunConfig(prompts_per_device=work.shape.rows // G),
        )
        algorithm, parameters = resolve_algorithm(config), tuple(adapter_parameters(work.policy).values())
        return Run(
            config=config,
            accelerator=Accelerator(cpu=work.device.type == "cpu"),
            policy=work.policy,
            rewards=Rewards(work.reward, {}, {work.reward.name: 1.0}),
            guide_model=work.reward if kind != "none" else None,
            gradient_model=work.reward if term else None,
            judge=None,
            stream=PromptStream(work.prompts, 0, config.run.prompts_per_device, 1),
            eval_prompts=None,
            parameters=parameters,
            optimizer=torch.optim.AdamW(parameters, lr=1e-6),
            algorithm=algorithm,
            readouts=load_readouts(config, algorithm),
            coverage=None,
            fingerprints={},
            tallies={},
        )

    def step(self, name: str) -> None:
        """One step as training makes it."""
        scored = rollout_step(self.runs[name], self.runs[name].prompts(0), 0, Clock())
        update_step(self.runs[name], scored, 0, 0, Clock())

    def floor(self, name: str) -> None:
        """The rollout's floor, the reward of the text, and of each term of the update the base without gradient and the
        policy with it; for the reward's gradient also its soft embeddings and the reward model, forward and backward.

        That term asks about the hidden places alone, one half of the completion on average.
        """
        work, (kind, *term) = self.work, name.split(" + ")
        C, table_VD = work.shape.completion, work.reward.embedding_VD
        assert table_VD is not None
        work.floor(1 if kind != "none" else 0)
        rows_B = torch.arange(work.shape.rows, device=work.device)
        everything_BC = torch.ones(work.shape.rows, C, dtype=torch.bool, device=work.device)
        session = work.reward.for_prompts(work.prompts)
        session(table_VD.new_zeros(work.shape.rows, C, table_VD.shape[1]), everything_BC, rows_B)
        with torch.no_grad(), work.policy.reference():
            self._logits(C)
        self._logits(C).log_softmax(-1)[..., 0].mean().backward()
        if term:
            with torch.no_grad(), work.policy.reference():
                self._logits(C // 2)
            soft_BHD = self._logits(C // 2).softmax(-1).to(table_VD.dtype) @ table_VD
            leaf_BCD = F.pad(soft_BHD.detach(), (0, 0, C - soft_BHD.shape[1], 0)).requires_grad_()
            (g_BCD,) = torch.autograd.grad(session(leaf_BCD, everything_BC, rows_B).sum(), leaf_BCD)
            (soft_BHD * g_BCD[:, -soft_BHD.shape[1] :]).sum().backward()
        work.policy.zero_grad(set_to_none=True)

    def _logits(self, places: int) -> torch.Tensor:
        """Of the last places of a canvas of mask tokens."""
        work, B, C = self.work, self.work.shape.rows, self.work.shape.completion
        canvas_BL = torch.cat([work.prompt_BL, torch.full((B, C), work.policy.mask_id, device=work.device)], 1)
        attention_BL = torch.cat([work.attention_BL, torch.ones(B, C, dtype=torch.bool, device=work.device)], 1)
        return work.policy.project(work.policy.states(canvas_BL, attention_BL)[:, -places:])

    def variants(self) -> dict[str, tuple[str, Callable[[], None]]]:
        """As `Workload.variants`."""
        result = {}
        for name in self.KINDS:
            result[f"floor {name}"] = (f"floor {name}", lambda name=name: self.floor(name))
            result[name] = (f"floor {name}", lambda name=name: self.step(name))
        return result


# ---------------------------------------------------------------------------------------------- measurement
def peak_memory(function: Callable[[], None], device: torch.device) -> float:
    """Bytes of tensors that were alive at once while `function` ran, above those before, by torch's own account."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as trace:
        function()
    events = [event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def seconds_of(function: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(
    work: Workload, variants: dict[str, tuple[str, Callable[[], None]]], rounds: int
) -> list[dict[str, float | str]]:
    """One row a variant. The round in which memory is watched also warms up and isn't timed.

    `ratio` is by the variant's floor, `of_plain` by the second variant, which has no guidance.
    """
    memory = {name: peak_memory(function, work.device) for name, (_, function) in variants.items()}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, (_, function) in variants.items():
            seconds[name].append(seconds_of(function, work.device))
    tokens, plain = work.shape.rows * work.shape.completion, list(variants)[1]
    return [
        {
            "variant": name,
            "seconds": statistics.median(seconds[name]),
            "ratio": statistics.median(a / b for a, b in zip(seconds[name], seconds[floor], strict=True)),
            "of_plain": statistics.median(a / b for a, b in zip(seconds[name], seconds[plain], strict=True)),
            "peak_mib": memory[name] / 2**20,
            "peak_nv": memory[name] / (4 * tokens * work.shape.vocab),
            "tokens_per_second": tokens / statistics.median(seconds[name]),
        }
        for name, (floor, _) in variants.items()
    ]


def profile(work: Workload, kind: str, guidance_steps: int) -> str:
    """Operators of one guided rollout by their own time."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if work.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as trace:
        work.rollout(kind, guidance_steps)
    order = "self_cuda_time_total" if work.device.type == "cuda" else "self_cpu_time_total"
    return trace.key_averages().table(sort_by=order, row_limit=15, max_name_column_width=40)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--steps", type=int, help="denoising steps T instead of the shape's")
    parser.add_argument("--guidance-steps", type=int, nargs="+", default=[1], metavar="M")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--whole-steps", action="store_true", help="whole training steps instead of rollouts")
    parser.add_argument("--json", metavar="FILE", help="write the table here too")
    parser.add_argument("--profile", action="store_true", help="also print where a guided rollout spends its time")
    args = parser.parse_args()
    shape = SHAPES[args.shape] if args.steps is None else replace(SHAPES[args.shape], steps=args.steps)
    for name, value in (
        ("--rounds", args.rounds),
        ("--steps", shape.steps),
        ("--guidance-steps", min(args.guidance_steps)),
    ):
        if value < 1:
            print(f"error: {name} must be 1 or more, not {value}", file=sys.stderr)
            sys.exit(2)
    if args.json and not os.path.isdir(os.path.dirname(args.json) or "."):
        print(f"error: --json {args.json}: no such folder", file=sys.stderr)
        sys.exit(2)
    if args.json and os.path.exists(args.json):
        print(f"error: --json {args.json} exists already; name another file", file=sys.stderr)
        sys.exit(2)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("error: --device cuda: torch sees no GPU here; use --device cpu", file=sys.stderr)
        sys.exit(2)
    work = Workload(shape, torch.device(args.device))
    machine = torch.cuda.get_device_name() if work.device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(
        f"{args.shape}: V {shape.vocab:,}, {shape.rows} rows, prompt {shape.prompt}, completion {shape.completion}, "
        f"T {shape.steps}, {shape.dtype}; {machine}; rounds: {args.rounds}"
    )
    variants = Steps(work).variants() if args.whole_steps else work.variants(args.guidance_steps)
    table = measure(work, variants, args.rounds)
    print(f"{'variant':<24}{'seconds':>9}{'x floor':>9}{'x plain':>9}{'peak MiB':>10}{'in NxV':>8}{'tokens/s':>10}")
    for row in table:
        print(
            f"{row['variant']:<24}{row['seconds']:>9.2f}{row['ratio']:>9.2f}{row['of_plain']:>9.2f}"
            f"{row['peak_mib']:>10.0f}{row['peak_nv']:>8.1f}{row['tokens_per_second']:>10.1f}"
        )
    peak, full = peak_memory(work.update, work.device), 4 * shape.rows * (shape.prompt + shape.completion) * shape.vocab
    print(f"update: peak {peak / 2**20:.0f} MiB, {peak / full:.3f} of the full canvas's logits in float32")
    if args.profile:
        print(profile(work, "entrgi", args.guidance_steps[0]))
    if args.json:
        versions = {"torch": torch.__version__, "python": platform.python_version(), "machine": machine}
        with open(args.json, "w", encoding="utf-8") as file:
            update = {"peak_mib": peak / 2**20, "share_of_full_logits": peak / full}
            json.dump(
                {"shape": args.shape, **asdict(shape), **versions, "table": table, "update": update}, file, indent=2
            )


if __name__ == "__main__":
    main()
