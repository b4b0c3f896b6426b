"""Every setting of a run, with its unit, limits, default and source. The strings below the fields are the manual.

Limits stand beside the type; what rules out a value together with another of its section follows the fields, and with
one of another section is in rules.py. A section that is made with a bad value raises `ConfigError`.
"""

import dataclasses
import difflib
import re
from dataclasses import field
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BeforeValidator, Discriminator, Tag

from rgrl.config.explain import short
from rgrl.config.kinds import (
    Anything,
    Flag,
    Infinite,
    Maybe,
    Number,
    PathText,
    Revision,
    Text,
    Wanted,
    Whole,
    section,
)
from rgrl.config.template import pieces
from rgrl.errors import ConfigError

# Far beyond what anybody needs. A larger number is a slip, and would hang a run or fill its memory.
MANY = 10**9
FAMILIES = ("auto", "dream", "llada", "a2d")  # those of rgrl.models.families, which needs torch


@section("model")
class ModelConfig:
    path: PathText = ""
    """Folder or Hub id of the diffusion LM, in its authors' checkpoint format. Required."""
    revision: Maybe[Revision] = None
    """Branch, tag or commit of a checkpoint of the Hub. None: its main branch. The run's `config.yaml` names the commit
    that was loaded."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the frozen base weights. The adapter is always float32."""
    quantize: Literal["none", "nf4", "int8"] = "none"
    """Store the linear layers of the frozen decoder in 4 bits (`nf4`, with doubly quantized scales, as QLoRA) or 8
    (`int8`), and compute in `dtype`. The embedding, the head and the adapter stay as they are. Needs bitsandbytes
    (`pip install -e ".[quantize]"`). Paper: 4 bits."""
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3"] = "sdpa"
    """Attention kernel, by transformers' name. Flash attention needs its own package, a GPU and `dtype: bfloat16`."""
    family: Text = "auto"
    """Model family: `dream`, `llada`, `a2d` (an autoregressive checkpoint turned diffusion: Qwen2, Qwen3, Llama), or
    your own by dotted path `package.module:attribute` (docs/families.md). `auto`: what config.json says."""
    mask_token: Maybe[Text] = None
    """The token that hides a place, as text, such as `<|mask|>`: one that was added to the tokenizer. None: what
    config.json or the tokenizer names."""
    end_token: Maybe[Text] = None
    """The token that ends an answer, besides end-of-text, as text. None: the family's, such as `<|im_end|>`, where the
    tokenizer has it."""
    shifted: Maybe[Flag] = None
    """Whether the output before a token scores it, as in the autoregressive model that it may come from; otherwise the
    output at its own place does. A checkpoint does not say. None: as the family does (`dream` and `a2d`: true, `llada`:
    false). A2D models of dllm: what they were trained with as `right_shift_logits`."""

    def __post_init__(self) -> None:
        if ":" not in self.family and self.family not in FAMILIES:
            raise ConfigError(
                f"`model.family` must be one of {', '.join(FAMILIES)}, or package.module:attribute, not "
                f"{short(self.family)}"
            )
        check_pinned("model", self.path, self.revision)


@section("lora")
class LoraConfig:
    path: Maybe[PathText] = None
    """Folder of a LoRA adapter to start from, in peft's format: `checkpoints/step_N/adapter` of another run, one of
    `rgrl export`, or one that peft saved. Its rank, alpha and layers must be those below. The optimizer and the steps
    start anew, and the reference of `objective.beta` stays the frozen base, without it. Only read where a run begins: a
    resumed run has its own adapter in the checkpoint. None: a fresh adapter that changes nothing yet."""
    r: Annotated[Whole, Ge(1), Le(8192)] = 32
    """Rank. RGRL paper: 32."""
    alpha: Annotated[Number, Gt(0), Le(1e6)] = 32.0
    """Scale; the update is multiplied by alpha / r. RGRL paper: 32."""
    dropout: Annotated[Number, Ge(0), Lt(1)] = 0.0
    """Probability in 0 ... 1. Paper: 0.1."""
    targets: Annotated[list[Text], MinLen(1)] = field(default_factory=lambda: ["auto"])
    """Linear layers to adapt: `auto` (all that the family has besides its head), names (`q_proj`, or the end of a path
    such as `0.self_attn.q_proj`), or regular expressions of a layer's whole path (`.*layers\\.[0-3]\\..*_proj`). Each
    must match at least one layer, and none the head or the embedding."""

    def __post_init__(self) -> None:
        for target in self.targets:
            try:
                re.compile(target)
            except re.error as error:
                raise ConfigError(f"`lora.targets`: {target!r} is not a regular expression: {error}") from None


@section("data")
class DataConfig:
    path: PathText = ""
    """Training prompts: a .jsonl, .json, .csv, .parquet or .txt (one prompt a line) file, a folder of such files or one
    written by `datasets.save_to_disk`, or a Hub id. Required, but for `generate`."""
    subset: Maybe[Text] = None
    """Configuration of a Hub data set, such as `main` of `openai/gsm8k`. None: the only one."""
    split: Text = "train"
    """Split of a Hub or saved data set; of `eval_path` too, where `eval_split` is not set. A file has none."""
    revision: Maybe[Revision] = None
    """Branch, tag or commit of a data set of the Hub. None: its main branch. The run's `config.yaml` names the commit
    that was read."""
    eval_path: Maybe[PathText] = None
    """Evaluation prompts, same forms. None: those of `eval_split` or `eval_fraction`; without these no evaluation."""
    eval_subset: Maybe[Text] = None
    """Configuration of `eval_path`, where that is set."""
    eval_split: Maybe[Text] = None
    """Split to evaluate on, of `eval_path`, or of `path` where that is not set."""
    eval_revision: Maybe[Revision] = None
    """Branch, tag or commit of `eval_path`, where that is set."""
    eval_fraction: Annotated[Number, Ge(0), Lt(1)] = 0.0
    """Fraction of the rows of `path` to hold out for evaluation, by the hash of the prompt's text: the same ones in any
    order and number, and a text that stands twice is on one side. 0: none."""
    eval_prompts: Annotated[Whole, Ge(1), Le(MANY)] = 64
    """Number of evaluation prompts used (the first ones)."""
    generate: Maybe[Literal["countdown", "sudoku4"]] = None
    """Puzzles made from a seed, instead of `path`: the same ones anywhere (rgrl/data/puzzles.py)."""
    generate_rows: Annotated[Whole, Ge(1), Le(10**7)] = 10000
    """Number of puzzles, those of `eval_fraction` among them."""
    generate_seed: Annotated[Whole, Ge(0), Lt(2**63)] = 0
    """Their seed."""
    column: Text = "prompt"
    """Column with the prompt: a string, or a list of chat messages with `role` (system, user, assistant) and `content`.
    Assistant turns at the end are left out: the prompt ends with the user's last turn."""
    turns: Literal["all", "first_user"] = "all"
    """What is taken of chat messages: `all` of them, which the templates of policy and reward models show alike, or
    only the text of the first user turn."""
    template: Maybe[Text] = None
    """A user turn with columns of the row in braces, such as `"{question}\\nAnswer:"`, instead of `column`. Braces
    themselves are doubled. Other values than text are written as JSON. None: `column`."""
    system: Maybe[Text] = None
    """System message put first. A chat that has one of its own keeps it."""
    where: dict[Text, Wanted] = field(default_factory=dict)
    """Rows to keep, by column: the value that it must have, or a list of such values, as in `{language: English}`. Of
    truth values only `true` and `false` are read as such: other words for them need quotes."""
    max_rows: Maybe[Annotated[Whole, Ge(1), Le(MANY)]] = None
    """Number of rows of `path` that are read at most (the first ones). None: all."""
    deduplicate: Flag = False
    """Keep the first of the rows whose prompts have the same text, and train on none that evaluation uses. `too_long`
    cuts later: evaluation goes without prompts that are trained on once they are cut."""
    min_prompt_length: Annotated[Whole, Ge(0), Le(10**7)] = 0
    """A prompt of fewer policy tokens is left out; chat markers do not count, and of a chat only the last turn does."""
    max_prompt_length: Annotated[Whole, Ge(1), Le(10**7)] = 512
    """Limit in policy tokens, chat markers included; see `too_long`."""
    too_long: Literal["error", "drop", "truncate"] = "error"
    """A longer prompt ends the run before it starts, is left out (`drop`), or loses its beginning (`truncate`): a chat
    its oldest turns, but for the system's, and then the last turn its first characters. Policy and rewards are shown
    the same rest. The run says how many."""
    max_bad: Annotated[Number, Ge(0), Lt(1)] = 0.0
    """Fraction of bad rows (no JSON, no prompt text, nested too deeply ...) above which a run refuses to start. Fewer
    are left out and counted."""

    def __post_init__(self) -> None:
        if self.path and self.generate is not None:
            raise ConfigError(f"`data.path` ({self.path}) and `data.generate` ({self.generate}) are both set: set one")
        check_pinned("data", self.path, self.revision)
        for name in ("eval_subset", "eval_revision"):
            if getattr(self, name) is not None and self.eval_path is None:
                raise ConfigError(
                    f"`data.{name}` is of `data.eval_path`, which is not set; `data.eval_split` alone is of `data.path`"
                )
        if self.eval_fraction and (self.eval_path is not None or self.eval_split is not None):
            other = "eval_path" if self.eval_path is not None else "eval_split"
            raise ConfigError(f"`data.eval_fraction` and `data.{other}` both name the evaluation prompts: set one")
        if self.generate is not None and self.eval_path is None and self.eval_split is not None:
            raise ConfigError("`data.eval_split`: generated puzzles have no splits; set `data.eval_fraction`")
        if self.template is not None and not any(name for _, name in pieces(self.template)):
            raise ConfigError(f"`data.template` names no column: {short(self.template)} would be every prompt")
        for name, value in self.where.items():
            values = value if isinstance(value, list) else [value]
            if not values or any(isinstance(one, list | dict) for one in values):
                raise ConfigError(f"`data.where.{name}` must be a value or a list of values, not {short(value)}")


@section("reward.functions.*", listed=False)
class PartConfig:
    """A function of the reward with more than its weight."""

    weight: Number = 1.0
    """Its weight in the sum of rewards. 0: it is only shown, and what no other part rates has no reward."""
    function: Maybe[Text] = None
    """The function, as the keys of `reward.functions` are, where its key there is another name. None: the key."""
    name: Maybe[Text] = None
    """Its name in `rewards/<name>/mean`. None: that of the function, or the key where `function` is set."""
    settings: dict[Text, Anything] = field(default_factory=dict)
    """Its own settings, as in `reward.settings`."""
    time_limit: Maybe[Annotated[Number, Ge(0), Le(1e7)]] = None
    """Seconds of one call, instead of `reward.time_limit`; of `math` and `pattern`, which have a process of their own,
    seconds of one completion, after which it gets None (defaults 5 and 1)."""
    clip: Maybe[list[Number]] = None
    """Lowest and highest value; what is beyond counts as that. Before the weight."""
    normalise: Flag = False
    """Advantages see it as its distance from the mean of the group (completions of one prompt), in standard deviations
    of the group (GDPO, arXiv 2601.05242), so that functions of any scale weigh alike. A group is always on one process,
    so no number depends on how a step is divided. The rewards shown stay as they were."""
    only_if: Maybe[Text] = None
    """Name of another part of the reward; this one is paid only where that one pays more than 0, and is 0 elsewhere."""

    def __post_init__(self) -> None:
        check_clip("reward.functions.*.clip", self.clip)


PART_KEYS = tuple(f.name for f in dataclasses.fields(PartConfig))
Part = Annotated[
    Annotated[Number, Tag("[number]")] | Annotated[PartConfig, Tag("[mapping]")],
    Discriminator(lambda value: "[mapping]" if isinstance(value, dict | PartConfig) else "[number]"),
]


def read_parts(value: Any) -> Any:
    """Refuse unknown keys by the name of their function. Raises `ConfigError`."""
    for name, part in value.items() if isinstance(value, dict) else ():
        for key in part if isinstance(part, dict) else ():
            if key not in PART_KEYS:
                near = difflib.get_close_matches(str(key), PART_KEYS, n=1, cutoff=0.6)
                meant = f"did you mean `{near[0]}`?" if near else f"a function has {', '.join(PART_KEYS)}"
                raise ConfigError(f"unknown key `reward.functions.{str(name)[:80]}.{str(key)[:80]}`; {meant}")
    return value


@section("reward")
class RewardConfig:
    path: Maybe[PathText] = None
    """Folder or Hub id of an `AutoModelForSequenceClassification` checkpoint with one label."""
    revision: Maybe[Revision] = None
    """Its branch, tag or commit on the Hub, as `model.revision`."""
    adapter: Maybe[PathText] = None
    """LoRA adapter of that model, merged when it is loaded."""
    name: Text = "model"
    """Its name in `rewards/<name>/mean`."""
    weight: Number = 1.0
    """Its weight in the sum of rewards."""
    clip: Maybe[list[Number]] = None
    """Lowest and highest score of that model that counts. Like the next two it shapes what is learned from, not what
    guides; they are explained at `reward.functions` (docs/verifiers.md)."""
    normalise: Flag = False
    """Advantages see its score in standard deviations of the group."""
    only_if: Maybe[Text] = None
    """It is paid only where the part of this name pays more than 0."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of its weights."""
    max_length: Annotated[Whole, Ge(0), Le(10**7)] = 0
    """Longest text that it is shown, in its tokens, template included. 0: as many as it has positions for. A longer
    text loses the beginning of its prompt, which `rewards/<name>/cut` counts. Also for a guide of its own."""
    functions: Annotated[dict[Text, Part], BeforeValidator(read_parts)] = field(default_factory=dict)
    """Verifiers by name (`numeric`, `exact`, `math`, `countdown`, `sudoku`, `tags`, `pattern`, `length`, `repetition`:
    docs/verifiers.md) and plain Python rewards by dotted path `package.module:function` -> weight, or a mapping with
    `weight`, `function`, `name`, `settings`, `time_limit`, `clip`, `normalise`, `only_if`. Python is called as
    `function(prompts, completions, rows)`, or by name with columns of the data, as `function(completions, answer)`
    (rgrl/rewards/functions.py), and returns one number a completion, or None for no reward from this one: the sum
    leaves it out, and a completion that gets none at all is left out of its group."""
    settings: dict[Text, dict[Text, Anything]] = field(default_factory=dict)
    """Settings of functions: function's name (after the colon) -> parameter -> value."""
    max_bad: Annotated[Number, Ge(0), Le(1)] = 0.0
    """Fraction of rows of the data that a verifier may fail to read, such as an answer that is no number; above it a
    run does not start. Those rows give no reward from it. An empty (null) answer does not count."""
    time_limit: Annotated[Number, Ge(0), Le(1e7)] = 300.0
    """Seconds that one call of a function may take before it is interrupted, the trial at a run's start too. 0: no
    limit. Native code that cannot be interrupted ends the process 30 seconds later, and prints where it hangs."""
    on_error: Literal["stop", "zero"] = "stop"
    """When a function raises or takes too long in a run: `stop` ends the run and names it; `zero` gives all completions
    of the call 0 from it, which contributes nothing to advantages, and counts the call in `rewards/<name>/failed`. A
    function that fails in the trial at a run's start ends it either way."""
    bridge: Literal["compose", "unknown", "zero"] = "compose"
    """What the guide is shown of a policy token that its tokenizer lacks: the mean of the tokens that spell it
    (`compose`), the unknown or end token (`unknown`), or `zero`. Special tokens that it lacks are zero, except that
    with `compose` an end token is its end token. A run says and logs how much of the text this is."""
    attend_eos: Flag = False
    """Whether the end-of-text token itself is shown to the guide. False agrees with scoring decoded text."""

    def __post_init__(self) -> None:
        check_pinned("reward", self.path, self.revision)
        check_clip("reward.clip", self.clip)


@section("judge")
class JudgeConfig:
    path: Maybe[PathText] = None
    """A second reward model that is only ever used in evaluation. None: no judge."""
    revision: Maybe[Revision] = None
    """Its branch, tag or commit on the Hub, as `model.revision`."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of its weights."""
    max_length: Annotated[Whole, Ge(0), Le(10**7)] = 0
    """As `reward.max_length`; `eval/judge_cut` counts."""

    def __post_init__(self) -> None:
        check_pinned("judge", self.path, self.revision)


@section("eval")
class EvalConfig:
    temperature: Maybe[Annotated[Number, Ge(0), Le(1e4)]] = None
    """Temperature of evaluations and of `rgrl sample`. None: `rollout.temperature`. 0: greedy, the most likely token at
    each place, under guidance that of the guided logits; places are then ranked at temperature 1, as the authors of
    Dream and LLaDA do. Paper: 0.7."""
    samples: Annotated[Whole, Ge(1), Le(4096)] = 1
    """Completions of each evaluation prompt, from which `eval/rewards/<name>/pass_at_<k>` is computed for 1, 2, 4, ...
    and this number. Every other number of an evaluation is over all of them. The first is the same whatever this is."""
    passes: dict[Text, Number] = field(default_factory=dict)
    """From which value on a reward counts as passed: its name (a function's is that after the colon) -> value. A
    function of `reward.functions` that is not named here counts at 1, as long as it gives numbers from 0 to 1 only;
    others, a penalty and a reward model have no pass."""


@section("rollout")
class RolloutConfig:
    num_generations: Annotated[Whole, Ge(1), Le(4096)] = 4
    """G, completions per prompt. Paper: 4."""
    max_completion_length: Annotated[Whole, Ge(1), Le(10**6)] = 128
    """C, mask tokens appended to each prompt. Paper: 128."""
    steps: Annotated[Whole, Ge(1), Le(10**6)] = 128
    """T, denoising steps, 1 ... C. Paper: 128."""
    temperature: Annotated[Number, Ge(0), Le(1e4)] = 0.9
    """Sampling temperature, > 0 in a run; `eval.temperature` is that of its evaluations. From Python 0 takes the most
    likely token everywhere. Paper: 0.9 in training, 0.7 at test time."""
    top_p: Annotated[Number, Gt(0), Le(1)] = 0.95
    """Nucleus: smallest set of tokens with this probability, in (0, 1]. Paper: 0.95."""
    top_k: Annotated[Whole, Ge(0), Le(MANY)] = 50
    """Only the k most likely tokens; 0 means all. Paper: 50."""
    confidence: Literal["entropy", "maskgit_plus", "topk_margin", "origin"] = "entropy"
    """Which positions to commit first: lowest entropy, most probable sampled token, widest margin between the two
    best tokens, or at random. Of equals, such as the many whose nucleus is one token at low temperature, first the one
    whose best token the policy finds likelier before temperature and nucleus, then the leftmost."""
    confidence_from: Literal["policy", "guided"] = "policy"
    """Whether the confidence is computed from the policy's own logits or the guided ones. With `policy` the unmasking
    order ignores guidance, except with `maskgit_plus`, which uses the probability of the sampled token."""
    position_temperature: Annotated[Number, Ge(0), Le(1e6)] = 0.0
    """Temperature of Gumbel noise added to the confidence; 0 is none."""
    micro_batch: Annotated[Whole, Ge(0), Le(MANY)] = 0
    """Number of rows that a process denoises at a time, in rollouts and evaluation; 0: all of a rollout's. Fewer use
    less memory and take longer; the rollouts are the same."""
    defer_eos: Flag = False
    """Give a sampled end-of-text the lowest confidence, so that it is not committed early."""
    commit_above: Annotated[Number, Gt(0), Le(1)] = 1.0
    """Approximation: a step also commits every position whose best token has a probability above this, which
    takes fewer steps (Fast-dLLM, arXiv 2505.22618). 1 turns it off."""
    block_length: Annotated[Whole, Ge(0), Le(10**6)] = 0
    """Write this many tokens at a time, block by block from left to right (semi-autoregressive remasking, LLaDA, arXiv
    2502.09992). 0: the whole completion at once."""
    block_cache: Flag = True
    """With `block_length`: an approximation that recomputes the keys and values of what precedes a block only when it
    begins (Fast-dLLM, arXiv 2505.22618). False: every step reads the whole canvas, as LLaDA's authors do; takes longer,
    and the recorded log-probabilities are those that the `trajectory` estimators compute."""

    def __post_init__(self) -> None:
        C, T, block = self.max_completion_length, self.steps, self.block_length
        if T > C:
            raise ConfigError(
                f"`rollout.steps` ({T}) is more than `rollout.max_completion_length` ({C}): there would be steps with "
                "nothing to commit"
            )
        if block and C % block:
            raise ConfigError(
                f"`rollout.block_length` ({block}) must be 0 or divide `rollout.max_completion_length` ({C})"
            )
        if block and T * block < C:
            raise ConfigError(
                f"`rollout.steps` ({T}) must be at least one for each block of `rollout.block_length` ({block}) tokens"
            )


@section("guidance")
class GuidanceConfig:
    kind: Literal["none", "expectation", "aps", "entrgi"] = "entrgi"
    """`none`; `expectation` (soft embeddings); `aps` (straight-through); `entrgi` (blend by entropy)."""
    steps: Annotated[Whole, Ge(0), Le(1000)] = 1
    """M, gradient steps per denoising step. Paper: 1 in training, 3 at test time."""
    eta: Annotated[Number, Ge(0), Le(1e6)] = 0.5
    """Step size on the logits. Paper: 0.5."""
    every: Annotated[Whole, Ge(1), Le(MANY)] = 1
    """Approximation: guide only at every k-th denoising step."""
    top_n: Annotated[Whole, Ge(0), Le(MANY)] = 0
    """Approximation: guide only the n most likely tokens of each position; 0 means all."""
    support: Literal["guided", "policy"] = "guided"
    """What can be sampled: the top-p/top-k of the steered logits (the paper's way), or that of the policy's own logits,
    weighted by the steered ones. A correction for guidance can be exact only with `policy`, or without truncation."""
    share: Annotated[Number, Ge(0), Le(1)] = 1.0
    """Fraction of each group's completions that are guided, 0 ... 1; the others are the policy's own."""
    eta_final: Maybe[Annotated[Number, Ge(0), Le(1e6)]] = None
    """Step size at the last step of the run, reached linearly from `eta`. None: constant."""
    probe_prompts: Annotated[Whole, Ge(0), Le(MANY)] = 16
    """Number of evaluation prompts that each evaluation also completes with guidance, to measure its effect."""
    path: Maybe[PathText] = None
    """A reward model to guide with, where it is not the scorer. None: `reward.path`, whose weights are shared."""
    revision: Maybe[Revision] = None
    """Its branch, tag or commit on the Hub, as `model.revision`."""

    def __post_init__(self) -> None:
        check_pinned("guidance", self.path, self.revision)
        if self.steps == 0:
            raise ConfigError("`guidance.steps` must be at least 1, not 0 (`guidance.kind: none` turns guidance off)")
        if self.top_n == 1:
            raise ConfigError("`guidance.top_n` must be 0 (all) or at least 2, not 1")
        # A run whose guidance fades ends with a step size of 0, and then with the kind `none`.
        if self.eta == 0 and self.kind != "none":
            raise ConfigError("`guidance.eta` must be above 0, not 0 (`guidance.kind: none` turns guidance off)")


@section("objective")
class ObjectiveConfig:
    weight: Annotated[Number, Ge(0), Le(1e6)] = 1.0
    """Weight of the objective's gradient, beside that of `gradient.weight`. 0 leaves the objective out, with its KL
    (`beta`) and all its forward passes."""
    name: Text = "reinforce"
    """`likelihood`, `weighted`, `wd1`, `reinforce`, `grpo`, `spg`, `dmpo`, `gdsd`, `tilt_matching`, or a dotted path
    `package.module:attribute`. `rgrl/algo/objectives.py` says what each one is."""
    estimator: Text = "one_step"
    """Log-probability estimator: `one_step`, `elbo`, `coupled`, `quadrature`, `sequence_elbo`, `trajectory`,
    `trajectory_sampled`, `block_bounds`, or a dotted path. `rgrl/algo/estimators.py` says what each one is."""
    draws: Annotated[Whole, Ge(1), Le(1000)] = 2
    """Number of random canvases (`elbo`, `block_bounds`), pairs of them (`coupled`, `sequence_elbo`), quadrature nodes
    (`quadrature`) or steps (`trajectory_sampled`) per estimate."""
    trajectory_steps: Annotated[Whole, Ge(1), Le(MANY)] = 1
    """`trajectory`, `trajectory_sampled`: denoising steps that share a canvas; 1 is exact (in blocks: with
    `rollout.block_cache: false`), more is cheaper."""
    block_length: Annotated[Whole, Ge(0), Le(MANY)] = 0
    """`block_bounds`: tokens of a block; 0 is the whole completion."""
    upper_power: Annotated[Number, Ge(1), Le(1000)] = 1.5
    """`block_bounds`: power of the upper bound, at least 1. SPG paper: 1.5."""
    upper_share: Annotated[Number, Ge(0), Le(1)] = 0.5
    """`block_bounds`: weight of the upper bound where the advantage is not positive, 0 ... 1. SPG paper: 0.5."""
    advantage: Text = "zscore"
    """`centred`, `zscore`, `leave_one_out`, `reward_weighted`, `tilted`, `wd1`, or a dotted path."""
    weight_temperature: Annotated[Number, Gt(0)] = 1.0
    """`reward_weighted`, `tilted`: beta, `wd1`: 1 / psi, in units of the reward; `gdsd`: 1 / psi, of the advantage."""
    control: Annotated[Number, Ge(0), Le(1)] = 1.0
    """`tilt_matching`: weight of the control variate, 0 ... 1; 0 does without."""
    correction: Literal["none", "truncate", "mask"] = "none"
    """Importance weights for tokens sampled under guidance, from c = (probability under the policy) / (under the guided
    sampler): `none` is 1, `truncate` min(c, correction_max), `mask` c where correction_min <= c <= correction_max, else
    0."""
    correction_level: Literal["token", "sequence"] = "token"
    """Whether c is of one token, or the product over a completion."""
    correction_min: Annotated[Number, Ge(0)] = 0.5
    """Lower end of the band of `mask`."""
    correction_max: Annotated[Infinite, Gt(0)] = 2.0
    """Upper end; `.inf` with `truncate` is the full correction."""
    beta: Annotated[Number, Ge(0)] = 0.0
    """Weight of the KL(policy || frozen base), per token."""
    kl: Literal["k3", "full"] = "k3"
    """How `beta`'s KL is computed: `k3`, an estimate from the tokens of the completion; `full`, the sum over the whole
    vocabulary (untempered) at the same places, which also resists what no completion of the batch has tried."""
    level: Literal["token", "sequence"] = "token"
    """`grpo`: whether the ratio and its clipping are per token or of a completion's mean token (GSPO)."""
    epsilon_low: Annotated[Number, Ge(0), Lt(1)] = 0.2
    """`grpo`: the ratio is clipped below 1 - epsilon_low."""
    epsilon_high: Annotated[Number, Ge(0)] = 0.2
    """`grpo`: the ratio is clipped above 1 + epsilon_high."""
    redraw: Flag = False
    """Whether each of a rollout's updates (`optim.updates`) has noise of its own (which tokens are hidden for the
    log-probabilities), as in d1, or that of the first. Takes a forward pass more for each update, for the
    log-probabilities before the first, where the objective needs those."""
    prompt_mask: Annotated[Number, Ge(0), Lt(1)] = 0.3
    """Probability with which `one_step` hides each prompt token. Paper: 0.3."""
    settings: dict[Text, Anything] = field(default_factory=dict)
    """Settings of an objective, estimator or advantage of your own, which finds them in `config.settings`."""

    def __post_init__(self) -> None:
        if self.correction_min > self.correction_max:
            raise ConfigError(
                f"`objective.correction_min` ({self.correction_min}) is above `objective.correction_max` "
                f"({self.correction_max})"
            )


@section("gradient")
class GradientConfig:
    weight: Annotated[Number, Ge(0), Le(1e6)] = 0.0
    """Weight of the reward's own gradient in the update (rgrl/algo/reward_gradient.py): the expected embeddings of the
    places that a denoising step hides, moved along the gradient of the reward model. 0: it is not computed."""
    of: Literal["reward", "guide"] = "reward"
    """Whose gradient: that of the reward model at `reward.path`, times `reward.weight` (Python functions have none); or
    of the guide (`guidance.path`, else `reward.path`), which need not be a part of the reward."""
    kl: Annotated[Number, Ge(0), Le(1e6)] = 1.0
    """Weight of the KL(policy || frozen base) over the whole vocabulary (untempered), within the term: its sum over the
    same hidden places, divided by the completion's tokens. 0: the base is not evaluated."""
    blend: Literal["entrgi", "expectation", "aps"] = "entrgi"
    """At what the reward's gradient is taken, as in `guidance.kind`: between the expected embedding and that of the
    completion's token by the policy's entropy w (`entrgi`), the expected one (w = 0), or the token's (w = 1)."""
    states: Literal["uniform", "late"] = "uniform"
    """Which of a row's denoising steps: first its block, uniformly (`rollout.block_length`), then a step of the block:
    any alike, or the late ones more often (u^(1/3) of the way), where most of the context is written."""
    draws: Annotated[Whole, Ge(1), Le(1000)] = 1
    """Number of steps drawn of each row, for each update."""
    places: Literal["all", "block"] = "all"
    """Which hidden places are asked about: all that the canvas hides at that step, or only those of the block that was
    being written. The reward is shown the rest of the completion as it was written."""


@section("optim")
class OptimConfig:
    learning_rate: Annotated[Number, Gt(0), Le(100)] = 5e-6
    """Peak learning rate of AdamW. Paper: 5e-6 at 7B."""
    warmup_steps: Annotated[Whole, Ge(0), Le(MANY)] = 0
    """Number of optimizer updates over which the rate rises to its peak in equal steps."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After the warm-up: constant, or a decay that would reach 0 just after the last update."""
    weight_decay: Annotated[Number, Ge(0), Le(1000)] = 0.0
    """AdamW's decoupled weight decay."""
    betas: list[Annotated[Number, Ge(0), Lt(1)]] = field(default_factory=lambda: [0.9, 0.999])
    """AdamW's two decay rates, of the mean of the gradients and of that of their squares, each in [0, 1). d1: 0.9 and
    0.99."""
    max_grad_norm: Annotated[Number, Gt(0)] = 1.0
    """Gradients are scaled down to this global norm. d1: 0.2."""
    updates: Annotated[Whole, Ge(1), Le(1000)] = 1
    """Number of optimizer updates on each rollout. d1: 12."""

    def __post_init__(self) -> None:
        if len(self.betas) != 2:
            raise ConfigError(f"`optim.betas` must be two numbers in [0, 1), such as [0.9, 0.999], not {self.betas}")


@section("run")
class RunConfig:
    output_dir: PathText = ""
    """Where everything is written, a folder of its own. Must not hold a run already, unless it is resumed, nor other
    files under a run's names. Required. In this and all paths `~` and environment variables are written out."""
    seed: Annotated[Whole, Ge(-(2**63)), Lt(2**63)] = 0
    """Seed of everything random."""
    steps: Annotated[Whole, Ge(1), Le(MANY)] = 500
    """Number of RGRL steps (one rollout each)."""
    save_steps: Annotated[Whole, Ge(0), Le(MANY)] = 100
    """Number of steps between checkpoints; the last step is always saved. 0: only the last."""
    keep_checkpoints: Annotated[Whole, Ge(1), Le(MANY)] = 2
    """Number of newest checkpoints kept."""
    eval_steps: Annotated[Whole, Ge(0), Le(MANY)] = 100
    """Number of steps between evaluations, which also run before the first step and after the last. 0: never."""
    prompts_per_device: Annotated[Whole, Ge(1), Le(10**5)] = 2
    """P, prompts each process rolls out per step; rows per process are P times num_generations. Paper: 2."""
    gradient_accumulation_steps: Annotated[Whole, Ge(1), Le(MANY)] = 1
    """Number of micro-batches into which a process splits its rows for the update; must divide them."""
    gradient_checkpointing: Flag = False
    """Recompute activations in the backward pass to save memory."""
    empty_cache: Literal["never", "step", "phase"] = "never"
    """When to return cached memory to the GPU: never, after each step, or also between rollout and update (`phase`),
    whose tensors have different shapes and may not fit each other's cached blocks."""
    resume_from_checkpoint: Maybe[PathText] = None
    """`latest`: the newest whole checkpoint of `output_dir`; `auto`: the same, or a fresh start if there is none
    yet (for requeued jobs); or the path of a checkpoint folder."""
    max_hours: Annotated[Number, Ge(0), Le(1e5)] = 0.0
    """Hours of wall clock after which the run saves and exits with code 75, as it does on SIGTERM and SIGUSR1: at the
    end of the current rollout or update. 0: no limit."""
    timeout_minutes: Annotated[Number, Gt(0), Le(1e6)] = 30.0
    """Minutes that a process waits for the others before it ends the run."""
    max_skipped: Annotated[Whole, Ge(1), Le(MANY)] = 10
    """Number of updates in a row skipped for a loss or gradient that is not finite, after which the run stops. The
    batch of each is written to `skipped/`."""
    on_hacking: Literal["warn", "stop", "off"] = "warn"
    """When an evaluation looks like reward hacking, the reward up while judge or diversity is down, each by more than
    its noise (docs/hacking.md): `warn` says so; `stop` also saves and ends the run with code 1; `off` does not look."""
    on_write_error: Literal["stop", "continue"] = "stop"
    """When a checkpoint, a line of metrics or a table cannot be written, such as on a full disk: `stop` ends the run;
    `continue` warns and tries again after the next step, except for a table, which is lost. Older checkpoints stay
    whole either way."""


@section("tracking")
class TrackingConfig:
    wandb: Flag = True
    """Log to Weights & Biases too. Its own settings (WANDB_MODE ...) decide how; offline without an account."""
    project: Text = "rgrl"
    """W&B project."""
    name: Maybe[Text] = None
    """W&B run name. None: the output folder's name."""
    completions_steps: Annotated[Whole, Ge(0), Le(MANY)] = 10
    """Number of steps between tables of rollouts; the last step always saves one. 0: only that one. Every evaluation
    saves its own."""


@section("")
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    gradient: GradientConfig = field(default_factory=GradientConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


def check_clip(key: str, clip: list[float] | None) -> None:
    """Refuse what is no pair of a lower and a higher limit. Raises `ConfigError`."""
    if clip is not None and (len(clip) != 2 or clip[0] >= clip[1]):
        raise ConfigError(f"`{key}` must be a lower and a higher limit, such as [-1, 1], not {clip}")


def check_pinned(section: str, path: str | None, revision: str | None) -> None:
    """Refuse the revision of nothing. Raises `ConfigError`."""
    if revision is not None and not path:
        raise ConfigError(f"`{section}.revision` ({revision}) pins `{section}.path`, which is not set")


def to_dict(config: Any) -> dict[str, Any]:
    """A config, or a section of one, as nested dictionaries."""
    return dataclasses.asdict(config)
