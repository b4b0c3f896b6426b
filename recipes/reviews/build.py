"""Build the reviews recipe's tokenizer, policy, reward model and judge from nothing, on two CPU cores.

    pip install -e ".[build]"
    python recipes/reviews/build.py --work /tmp/reviews-build

Stages: tokenizer -> policy -> reward -> judge -> report. Each writes into `recipes/reviews/` when it is
done; training state is kept in `--work` every few hundred steps, so a stopped build goes on where it was.
"""

import argparse
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import corpus
import torch
import torch.nn.functional as F
from policies import POLICIES, SPECIALS, VOCAB, PolicyRecipe, checkpoint
from safetensors.torch import save_file
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import Ridge
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3Config,
    Qwen3ForSequenceClassification,
)
from transformers.utils.logging import disable_progress_bar

from rgrl.config import ModelConfig, RolloutConfig
from rgrl.models import load_policy
from rgrl.models.batch import pad_left
from rgrl.rewards import load_classifier
from rgrl.rollout import generate
from rgrl.seeds import generators
from rgrl.types import Prompts

HERE = Path(__file__).parent
SEED = 20602
ARITHMETIC = torch.bfloat16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else torch.float32
LM_STEPS, REWARD_STEPS = 400, 800  # of the reward model and of the judge
PENALTY = 4.0  # rating points that broken text loses


# ---------------------------------------------------------------------------------------------- training
def train(
    name: str,
    work: Path,
    model: torch.nn.Module,
    loss_fn: Callable[[torch.nn.Module, int], Tensor],
    steps: int,
    learning_rate: float,
    weight_decay: float = 0.05,
) -> None:
    """Muon on the matrices, AdamW on the rest, arithmetic in ARITHMETIC over float32 weights, linear decay to 0.

    `loss_fn(model, step)` draws its own batch from `step`, so the state that a resumed run needs is the
    weights, the two optimizers and one integer. Saved every 200 steps to `work/NAME.pt`.
    """
    master = {k: p.detach().clone().float() for k, p in model.named_parameters()}
    # Muon makes its matrices orthogonal in bf16, which takes a CPU without it longer than all the rest.
    muon = ARITHMETIC == torch.bfloat16
    matrices = [k for k, p in master.items() if muon and p.ndim == 2 and "embed" not in k and "score" not in k]
    others = [k for k in master if k not in matrices]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW([master[k] for k in others], lr=learning_rate, weight_decay=0.01, betas=(0.9, 0.98))
    ]
    if matrices:
        kept = [master[k] for k in matrices]
        optimizers.insert(
            0, torch.optim.Muon(kept, lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        )
    state_path, start = work / f"{name}.pt", 0
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        start = state["step"]
        for k, value in state["master"].items():
            master[k].copy_(value)
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    parameters = dict(model.named_parameters())
    model.to(ARITHMETIC).train()

    def refresh() -> None:
        for k, p in parameters.items():
            p.data.copy_(master[k])

    refresh()
    average = None
    for step in range(start, steps):
        loss = loss_fn(model, step)
        loss.backward()
        for k, p in parameters.items():
            master[k].grad = p.grad.float() if p.grad is not None else None
            p.grad = None
        torch.nn.utils.clip_grad_norm_(master.values(), 1.0)
        scale = min(1.0, (step + 1) / 100) * (1 - step / steps)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * scale
            optimizer.step()
        refresh()
        average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
        if (step + 1) % 200 == 0 or step + 1 == steps:
            print(f"{name} step {step + 1}/{steps} loss {average:.4f}", flush=True)
            partial = state_path.with_suffix(".tmp")
            torch.save(
                {"step": step + 1, "master": master, "optimizers": [o.state_dict() for o in optimizers]}, partial
            )
            partial.replace(state_path)
    model.eval()


# ------------------------------------------------------------------------------------------------ policies
def load_tokenizer(recipe: PolicyRecipe) -> PreTrainedTokenizerBase:
    return recipe.family.load_tokenizer(HERE / recipe.folder)


def new_policy(recipe: PolicyRecipe, config: dict) -> PreTrainedModel:
    decoder = recipe.family.make_config(config)
    decoder.is_causal = False  # the decoder's own switch to attend both ways
    return recipe.family.model_class(decoder)


def encode_pairs(
    recipe: PolicyRecipe, tokenizer: PreTrainedTokenizerBase, texts: list[str], words: list[int]
) -> list[tuple[list[int], list[int]]]:
    """(prompt ids in the chat format, completion ids without end-of-text) of each text cut after `words[i]` words."""
    cut = [corpus.split_opening(text, n) for text, n in zip(texts, words, strict=True)]
    turns = [[{"role": "user", "content": opening}] for opening, _ in cut]
    prompts = tokenizer(tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))["input_ids"]
    completions = tokenizer([rest for _, rest in cut])["input_ids"]
    end = tokenizer.convert_tokens_to_ids(recipe.end)
    return [(prompt, (rest + end)[: recipe.completion]) for prompt, rest in zip(prompts, completions, strict=True)]


def canvas_of(
    recipe: PolicyRecipe, tokenizer: PreTrainedTokenizerBase, pairs: list[tuple[list[int], list[int]]]
) -> tuple[Tensor, Tensor, Tensor]:
    """Left-padded prompts and end-of-text-padded completions: canvas_BL, attention_BL, weight_BC of the loss."""
    ends = 0 if recipe.end else 1  # the first of the padding ends a completion that has no end of its own
    width, C = max(len(p) for p, _ in pairs), recipe.completion
    canvas_BL = torch.full((len(pairs), width + C), tokenizer.eos_token_id)
    attention_BL = torch.ones_like(canvas_BL)
    weight_BC = torch.full((len(pairs), C), 0.05)  # end-of-text after the first is all alike: count it little
    for i, (prompt, completion) in enumerate(pairs):
        canvas_BL[i, width - len(prompt) : width] = torch.tensor(prompt)
        attention_BL[i, : width - len(prompt)] = 0
        canvas_BL[i, width : width + len(completion)] = torch.tensor(completion, dtype=torch.long)
        weight_BC[i, : len(completion) + ends] = 1.0
    return canvas_BL, attention_BL, weight_BC


def policy_logits(
    recipe: PolicyRecipe, model: PreTrainedModel, canvas_BL: Tensor, attention_BL: Tensor, at_BL: Tensor
) -> Tensor:
    """At the places `at_BL`: by Dream's convention the state at l-1 scores token l, by LLaDA's the one at l.

    Positions count real tokens.
    """
    position_BL = (attention_BL.cumsum(1) - 1).clamp(min=0)
    states = model.model(
        input_ids=canvas_BL, attention_mask=attention_BL, position_ids=position_BL, use_cache=False
    ).last_hidden_state
    states_NH = states[:, :-1][at_BL[:, 1:]] if recipe.family.shifted else states[at_BL]
    return model.lm_head(states_NH).float()


def masked_cross_entropy(
    recipe: PolicyRecipe,
    model: PreTrainedModel,
    mask_id: int,
    canvas: tuple[Tensor, Tensor, Tensor],
    masked_BC: Tensor,
) -> Tensor:
    """Weighted nats per masked token; `canvas` is what `canvas_of` returns."""
    canvas_BL, attention_BL, weight_BC = canvas
    width = canvas_BL.shape[1] - recipe.completion
    at_BL = F.pad(masked_BC, (width, 0))
    logits_NV = policy_logits(recipe, model, canvas_BL.masked_fill(at_BL, mask_id), attention_BL, at_BL)
    loss_N = F.cross_entropy(logits_NV, canvas_BL[at_BL], reduction="none")
    weight_N = weight_BC[masked_BC]
    return (loss_N * weight_N).sum() / weight_N.sum()


def build_policy(recipe: PolicyRecipe, reviews: list[str], others: list[str], work: Path) -> None:
    """Two stages: prose first and more and more reviews, then reviews nearly alone at half the rate."""
    torch.manual_seed(SEED)
    tokenizer, out, name = load_tokenizer(recipe), HERE / recipe.folder, recipe.name
    config = recipe.config(tokenizer)
    mask_id, rows = config["mask_token_id"], recipe.rows
    model = new_policy(recipe, config)
    if recipe.start is not None:
        recipe.start(model, tokenizer, load_policy(ModelConfig(path=str(HERE / POLICIES[0].folder))))

    def loss_fn(model: torch.nn.Module, step: int) -> Tensor:
        rng = random.Random(f"{name}/{SEED}/{step}")
        share = min(0.95, 0.15 + 0.95 * max(0.0, step / max(1, recipe.first_steps) - 0.05))
        texts = [rng.choice(reviews if rng.random() < share else others) for _ in range(rows)]
        pairs = encode_pairs(recipe, tokenizer, texts, [rng.randint(0, corpus.OPENING_WORDS) for _ in texts])
        canvas_BL, attention_BL, weight_BC = canvas_of(recipe, tokenizer, pairs)
        generator = torch.Generator().manual_seed(SEED * 1_000_003 + step)
        width = canvas_BL.shape[1] - recipe.completion
        # A canvas may also end before its last place, anywhere after the text, as at a smaller completion length.
        for i, (_, completion) in enumerate(pairs):
            if rng.random() < 0.5:
                end = rng.randint(min(len(completion) + 1, recipe.completion), recipe.completion)
                attention_BL[i, width + end :] = 0
                weight_BC[i, end:] = 0.0
        rate_B1 = ((torch.arange(rows) + torch.rand(rows, generator=generator)) / rows)[:, None].clamp(min=0.05)
        masked_BC = torch.rand(weight_BC.shape, generator=generator) < rate_B1
        masked_BC &= weight_BC > 0
        # In a quarter of the rows some of the prompt is hidden, as the one-step estimator will do.
        hidden = (torch.rand(rows, width, generator=generator) < 0.2) & (torch.arange(rows) % 4 == 0)[:, None]
        hidden &= (canvas_BL[:, :width] < len(tokenizer) - len(recipe.specials)) & (attention_BL[:, :width] > 0)
        canvas_BL[:, :width][hidden] = mask_id
        return masked_cross_entropy(recipe, model, mask_id, (canvas_BL, attention_BL, weight_BC), masked_BC)

    first = recipe.first_steps
    train(name, work, model, loss_fn, first, learning_rate=2e-3)
    train(f"{name}_reviews", work, model, lambda m, i: loss_fn(m, first + i), recipe.second_steps, learning_rate=1e-3)
    (out / "config.json").write_text(json.dumps(config, indent=2))
    save_file(checkpoint(recipe, model), out / "model.safetensors", metadata={"format": "pt"})


@torch.no_grad()
def policy_figures(recipe: PolicyRecipe, texts: list[str]) -> dict[str, float]:
    """Held-out masked cross-entropy, nats per masked token (text and its end), by mask rate."""
    policy, tokenizer = load_policy(ModelConfig(path=str(HERE / recipe.folder))), load_tokenizer(recipe)
    figures = {}
    for rate in (0.25, 0.5, 0.75):
        generator, rng, total, count = torch.Generator().manual_seed(1), random.Random(1), 0.0, 0
        for i in range(0, len(texts), 64):
            chunk = texts[i : i + 64]
            pairs = encode_pairs(recipe, tokenizer, chunk, [rng.randint(0, corpus.OPENING_WORDS) for _ in chunk])
            canvas_BL, attention_BL, weight_BC = canvas_of(recipe, tokenizer, pairs)
            masked_BC = (torch.rand(weight_BC.shape, generator=generator) < rate) & (weight_BC == 1)
            n, canvas = int(masked_BC.sum()), (canvas_BL, attention_BL, weight_BC)
            total += n * float(masked_cross_entropy(recipe, policy.causal_lm, policy.mask_id, canvas, masked_BC))
            count += n
        figures[str(rate)] = round(total / count, 3)
    return figures


# --------------------------------------------------------------------------------- reward model and judge
@dataclass(frozen=True)
class RewardRecipe:
    """What distinguishes the judge from the reward model: ratings, seed, size, and the corruptions it has seen."""

    name: str
    half: int
    seed: int
    width: int
    layers: int
    corruptions: tuple[Callable[[random.Random, str, str], str], ...]
    sampler: dict[str, object]  # how the policy's own samples that it learns to tell from real text were drawn


def loop_tail(rng: random.Random, text: str, other: str) -> str:
    """One to three words of the text over and over."""
    words, n = text.split(), rng.randint(1, 3)
    start = rng.randint(0, max(0, len(words) - n))
    keep = rng.randint(0, len(words) // 2)
    loop = words[start : start + n] * len(words)
    return " ".join((words[:keep] + loop)[: max(len(words), 6)])


def stutter(rng: random.Random, text: str, other: str) -> str:
    """Some words doubled or tripled where they stand."""
    return " ".join(w for word in text.split() for w in [word] * rng.choice((1, 1, 2, 3)))


def shuffle_all(rng: random.Random, text: str, other: str) -> str:
    words = text.split()
    rng.shuffle(words)
    return " ".join(words)


def shuffle_near(rng: random.Random, text: str, other: str) -> str:
    """Words moved by up to three places."""
    words = text.split()
    order = sorted(range(len(words)), key=lambda i: i + rng.uniform(0, 4))
    return " ".join(words[i] for i in order)


def splice(rng: random.Random, text: str, other: str) -> str:
    """The first half of one text, cut mid-clause, and the second half of another."""
    a, b = text.split(), other.split()
    return " ".join(a[: rng.randint(2, max(2, len(a) - 2))] + b[rng.randint(1, max(1, len(b) - 2)) :])


def sprinkle(rng: random.Random, text: str, other: str) -> str:
    """A third of the words replaced by words of another text."""
    words, b = text.split(), other.split()
    return " ".join(rng.choice(b) if rng.random() < 0.35 else word for word in words)


def phrases(rng: random.Random, text: str, other: str) -> str:
    """Two-word pieces of two texts in turn: loops of plausible phrases that go nowhere."""
    a, b = text.split(), other.split()
    pieces = [words[i : i + 2] for words in (a, b) for i in range(0, len(words) - 1, 2)]
    rng.shuffle(pieces)
    return " ".join(word for piece in pieces[: max(3, len(a) // 2)] for word in piece)


REWARD = RewardRecipe(
    "reward",
    0,
    31,
    160,
    4,
    (loop_tail, shuffle_all, splice),
    {"temperature": 1.0, "steps": 16, "confidence": "entropy"},
)
JUDGE = RewardRecipe(
    "judge",
    1,
    47,
    128,
    5,
    (stutter, shuffle_near, sprinkle, phrases, loop_tail),
    {"temperature": 0.8, "steps": 8, "confidence": "origin"},
)
ALL_CORRUPTIONS = {
    "loops": (loop_tail, stutter),
    "shuffles": (shuffle_all, shuffle_near),
    "splices": (splice, sprinkle),
}


def policy_samples(folder: Path, openings: list[str], seed: int, sampler: dict[str, object]) -> list[tuple[str, str]]:
    """(opening, unguided completion) from the built policy, one per opening."""
    policy = load_policy(ModelConfig(path=str(folder)))
    settings = RolloutConfig(max_completion_length=24, top_k=50, top_p=0.95, **sampler)
    pairs: list[tuple[str, str]] = []
    for start in range(0, len(openings), 64):
        chunk = openings[start : start + 64]
        rollout = generate(policy, chunk, settings, generators(seed, 0, range(start, start + len(chunk)), "samples"))
        pairs += zip(chunk, policy.decode(rollout.completion_BC), strict=True)
    return pairs


def framed(tokenizer: PreTrainedTokenizerBase, cut: list[tuple[str, str]]) -> tuple[Tensor, Tensor]:
    """Token ids and attention of (opening, rest) pairs in the chat format, left-padded as rgrl scores them."""
    rows = tokenizer([f"<|user|>{opening}<|assistant|>{rest}" for opening, rest in cut])["input_ids"]
    ids_BL, attention_BL = pad_left([row[:56] for row in rows], torch.device("cpu"))
    return ids_BL, attention_BL.long()


def read_scores(model: torch.nn.Module, ids_BL: Tensor, attention_BL: Tensor) -> tuple[Tensor, Tensor]:
    """r_B at each row's last token, and the states for the next-token loss."""
    states_BLD = model.model(
        input_ids=ids_BL, attention_mask=attention_BL, position_ids=(attention_BL.cumsum(1) - 1).clamp(min=0)
    ).last_hidden_state
    return model.score(states_BLD[:, -1])[:, 0].float(), states_BLD


def random_cut(rng: random.Random, text: str) -> tuple[str, str]:
    return corpus.split_opening(text, rng.randint(1, min(corpus.OPENING_WORDS, len(text.split()) - 1)))


def word_teacher(texts: list[str], ratings: list[float]) -> Callable[[list[str]], list[float]]:
    """Ridge regression of the rating on words and word pairs: it rates text that nobody rated.

    With ten thousand ratings it tells liked from disliked text better than a network trained from nothing, and
    what it says of the unrated text is what the network can learn from without memorising.
    """
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"(?u)\S+", sublinear_tf=True)
    ridge = Ridge(alpha=1.0).fit(vectorizer.fit_transform(texts), ratings)
    return lambda unrated: ridge.predict(vectorizer.transform(unrated)).tolist()


def build_reward(
    recipe: RewardRecipe,
    tokenizer: PreTrainedTokenizerBase,
    snippets: list[corpus.Snippet],
    lexicon: dict[str, float],
    prose: list[str],
    samples: list[tuple[str, str]],
    work: Path,
    out: Path,
) -> None:
    """A causal LM first, then one squared error for everything: the rating, less PENALTY for text that is broken.

    Ratings are those of people where this recipe's half of the data has them, else `word_teacher`'s. One squared
    error for both jobs, since two ranking losses fight: the network comes to know its rated texts by
    heart as "real", and takes other real text for broken.
    """
    torch.manual_seed(recipe.seed)
    model = Qwen3ForSequenceClassification(
        Qwen3Config(
            vocab_size=VOCAB,
            hidden_size=recipe.width,
            intermediate_size=recipe.width * 8 // 3 // 16 * 16,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.width // 32,
            num_key_value_heads=recipe.width // 32,
            head_dim=32,
            max_position_embeddings=256,
            num_labels=1,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    mine = [s for s in snippets if s.half == recipe.half]
    words = [(w, r) for w, r in lexicon.items() if corpus.half_of(w) == recipe.half]
    rate = word_teacher(
        [s.text for s in mine] + [w for w, _ in words], [s.rating for s in mine] + [r for _, r in words]
    )
    movies = [(s.text, s.rating) for s in mine if s.source == "movie"]
    others = [(s.text, s.rating) for s in mine if s.source != "movie"]
    theirs = [s.text for s in snippets if s.half != recipe.half and s.source == "movie"]  # without their ratings
    unrated, plain = list(zip(theirs, rate(theirs), strict=True)), list(zip(prose, rate(prose), strict=True))
    own = list(zip(samples, rate([opening + rest for opening, rest in samples]), strict=True))
    texts = prose + [s.text for s in snippets] * 3

    def loss_fn(model: torch.nn.Module, step: int) -> Tensor:
        rng = random.Random(
            f"{recipe.name}/{recipe.seed}/q{step}"
        )  # the name that the shipped weights were drawn under
        if step < LM_STEPS:
            ids_BL, attention_BL = framed(tokenizer, [random_cut(rng, rng.choice(texts)) for _ in range(48)])
            return next_token(model, ids_BL, attention_BL, read_scores(model, ids_BL, attention_BL)[1])

        def draw(rated: list, n: int) -> list:
            return [rng.choice(rated) for _ in range(n)]

        human = draw(movies, 44) + draw(others, 10)
        real = human + draw(unrated, 24) + draw(plain, 8)
        listed = draw(words, 10)
        broken = []
        for text, rating in draw(movies, 14) + draw(unrated, 14) + draw(plain, 4):
            corrupt = rng.choice(recipe.corruptions)(rng, text, rng.choice(movies)[0])
            if len(corrupt.split()) > 1:
                broken.append((random_cut(rng, corrupt), rating - PENALTY))
        # A policy's sample is not broken everywhere.
        broken += [(cut, rating - 0.7 * PENALTY) for cut, rating in draw(own, 14)]
        rows = [(random_cut(rng, text), rating) for text, rating in real] + broken
        rows += [((rng.choice(("the film", "it is", "the plot", "this movie")), " " + w), r) for w, r in listed]
        ids_BL, attention_BL = framed(tokenizer, [cut for cut, _ in rows])
        # A tenth of the words is hidden, so that no text can be known by heart.
        hidden_BL = torch.rand(ids_BL.shape, generator=torch.Generator().manual_seed(step)) < 0.1
        hidden_BL &= ids_BL < len(tokenizer) - len(SPECIALS)
        score_B, states_BLD = read_scores(model, ids_BL.masked_fill(hidden_BL, tokenizer.mask_token_id), attention_BL)
        error_B = (score_B - torch.tensor([target for _, target in rows])).square()
        n, k = len(human), len(listed)
        squared = (error_B[:-k].sum() + 0.3 * error_B[-k:].sum()) / (len(rows) - 0.7 * k)
        return squared + 0.05 * next_token(model, ids_BL[:n], attention_BL[:n], states_BLD[:n])

    train(recipe.name, work, model, loss_fn, LM_STEPS + REWARD_STEPS, learning_rate=2e-3, weight_decay=0.1)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def next_token(model: torch.nn.Module, ids_BL: Tensor, attention_BL: Tensor, states_BLD: Tensor) -> Tensor:
    """Next-token cross-entropy, the input embeddings as output layer: it teaches words that no rating covered."""
    keep_BL = (attention_BL[:, :-1] > 0) & (attention_BL[:, 1:] > 0)
    logits_NV = F.linear(states_BLD[:, :-1][keep_BL], model.model.embed_tokens.weight).float()
    return F.cross_entropy(logits_NV, ids_BL[:, 1:][keep_BL])


def reward_figures(folder: Path, held_out: list[corpus.Snippet], samples: list[tuple[str, str]]) -> dict[str, float]:
    """On held-out reviews: pair accuracy (ratings more than a point apart), correlation, and real over corrupted."""
    reward = load_classifier(str(folder), "cpu")
    rng = random.Random(7)
    movies = [s for s in held_out if s.source == "movie"]

    def score(cut: list[tuple[str, str]]) -> Tensor:
        parts = [reward.score(Prompts([o for o, _ in c], [{} for _ in c]), [r for _, r in c]) for c in chunks(cut, 128)]
        return torch.cat(parts)

    real = [random_cut(rng, s.text) for s in movies]
    score_B, rating_B = score(real), torch.tensor([s.rating for s in movies])
    apart_BB = rating_B[:, None] - rating_B[None, :] > 1
    right = (score_B[:, None] > score_B[None, :])[apart_BB].float().mean()
    figures = {
        "pair_accuracy": round(float(right), 3),
        "correlation": round(float(torch.corrcoef(torch.stack([score_B, rating_B]))[0, 1]), 3),
    }
    for name, kinds in ALL_CORRUPTIONS.items():
        fakes = [random_cut(rng, rng.choice(kinds)(rng, s.text, rng.choice(movies).text)) for s in movies]
        figures[f"real_over_{name}"] = round(float((score_B > score(fakes)).float().mean()), 3)
    n = min(len(samples), len(score_B))
    figures["real_over_policy_samples"] = round(float((score_B[:n] > score(samples[:n])).float().mean()), 3)
    return figures


def chunks(items: list, size: int) -> Iterator[list]:
    for i in range(0, len(items), size):
        yield items[i : i + size]


# -------------------------------------------------------------------------------------------------- main
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/reviews"), help="downloads and training state")
    parser.add_argument(
        "--only", choices=[*(policy.name for policy in POLICIES), "reward", "judge"], help="just this one"
    )
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    disable_progress_bar()  # of transformers' own loading and saving
    corpus.fetch(args.work / "download")
    snippets, lexicon = corpus.rated(args.work / "download")
    prose = corpus.plain(args.work / "download")
    known = [s for s in snippets if not s.held_out]
    reviews = [s.text for s in known if s.source == "movie"]  # the long ones are cut at the end of the canvas
    unrated = [s.text for s in known if s.source in ("nyt", "amazon")] + prose
    held_out = [s for s in snippets if s.held_out]
    figures: dict[str, object] = {}
    for policy in POLICIES:
        if args.only not in (None, policy.name):
            continue
        if not (HERE / policy.folder / "tokenizer_config.json").exists():
            policy.build_tokenizer(policy.text(known, prose), HERE / policy.folder)
        tokenizer = load_tokenizer(policy)
        if not (HERE / policy.folder / "model.safetensors").exists():
            others = short(policy, tokenizer, unrated)
            print(f"{policy.name}: {len(reviews)} reviews, {len(others)} other sentences", flush=True)
            build_policy(policy, reviews, others, args.work)
        test = short(policy, tokenizer, [s.text for s in held_out if s.source == "movie"])
        figures[policy.name] = policy_figures(policy, test)
        print(f"{policy.name}, held-out masked cross-entropy by mask rate:", figures[policy.name], flush=True)
    if args.only in [policy.name for policy in POLICIES]:
        return
    policy_dir, tokenizer = HERE / POLICIES[0].folder, load_tokenizer(POLICIES[0])
    rng = random.Random(SEED)
    test_openings = [random_cut(rng, s.text)[0] for s in held_out if s.source == "movie"][:512]
    test_samples = cached(
        args.work / "samples_test.json",
        lambda: policy_samples(policy_dir, test_openings, 3, {"temperature": 0.9, "steps": 16}),
    )
    for recipe in (REWARD, JUDGE):
        if args.only not in (None, recipe.name):
            continue
        rng = random.Random(recipe.seed)
        openings = [random_cut(rng, text)[0] for text in rng.sample(reviews, 1536)]
        samples = cached(
            args.work / f"samples_{recipe.name}.json",
            lambda recipe=recipe, openings=openings: policy_samples(policy_dir, openings, recipe.seed, recipe.sampler),
        )
        if not (HERE / recipe.name / "model.safetensors").exists():
            long = [s for s in known if len(s.text.split()) > 3]
            print(f"{recipe.name}: ratings of half {recipe.half} of {len(long)} snippets", flush=True)
            build_reward(recipe, tokenizer, long, lexicon, prose, samples, args.work, HERE / recipe.name)
        figures[recipe.name] = reward_figures(HERE / recipe.name, held_out, test_samples)
        print(f"{recipe.name}, held out:", figures[recipe.name], flush=True)
    if args.only is None:
        (HERE / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")


def short(recipe: PolicyRecipe, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[str]:
    """The texts that a completion has room for."""
    return [t for t, ids in zip(texts, tokenizer(texts)["input_ids"], strict=True) if len(ids) < recipe.completion]


def cached(path: Path, make: Callable[[], list[tuple[str, str]]]) -> list[tuple[str, str]]:
    """What `make` returns, from `path` if it was made before."""
    if not path.exists():
        path.write_text(json.dumps(make()))
    return [(opening, completion) for opening, completion in json.loads(path.read_text())]


if __name__ == "__main__":
    main()
