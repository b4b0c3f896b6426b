"""A pretrained sentence encoder, tuned on human ratings: the strong judge, and the teachers of the small models.

`strong_judge.py` says where it comes from. Used by `build.py` alone.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import corpus
import torch
from broken import Breaker
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoTokenizer, BertForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

PENALTY = 4.0  # rating points that broken text loses
# Rounds of tuning: their steps, and film reviews, other snippets, broken texts and samples of a batch. The first learns
# what broken text is, those after it hear the ratings better.
FIRST, LATER = (320, (15, 3, 9, 5)), (250, (24, 2, 4, 2))
GROUP = 8  # rows of a forward pass
TOKENS = 56  # longest text
Cut = tuple[str, str]  # an opening and what follows


@dataclass(frozen=True)
class Half:
    """What one half of the ratings offers to learn from."""

    name: str
    seed: int
    movies: list[tuple[str, float]]
    others: list[tuple[str, float]]  # product reviews, editorials, tweets
    samples: list[tuple[Cut, float]]  # the policy's own text, rated for its words alone
    corruptions: tuple[Breaker, ...]
    lexicon: dict[str, float]

    def draw(self, rng: random.Random, mix: tuple[int, int, int, int]) -> Iterator[tuple[Cut, float]]:
        """A batch of texts and what each is to score: the rating, less PENALTY where the text is broken."""
        movies, others, broken, samples = mix
        real = [rng.choice(self.movies) for _ in range(movies)] + [rng.choice(self.others) for _ in range(others)]
        for text, rating in real:
            yield random_cut(rng, shortened(rng, text)), rating
        while broken:
            text, rating = rng.choice(self.movies)
            made = rng.choice(self.corruptions)(rng, shortened(rng, text), rng.choice(self.movies)[0], self.lexicon)
            if len(made.split()) > 1:
                broken -= 1
                yield random_cut(rng, made), rating - PENALTY
        for _ in range(samples):
            cut, rating = rng.choice(self.samples)
            yield cut, rating - PENALTY


def random_cut(rng: random.Random, text: str) -> Cut:
    return corpus.split_opening(text, rng.randint(1, min(corpus.OPENING_WORDS, len(text.split()) - 1)))


def shortened(rng: random.Random, text: str) -> str:
    """A few of the texts end early, as completions at the end of their canvas do: no sign of broken text."""
    words = text.split()
    return " ".join(words[: rng.randint(8, 20)]) if rng.random() < 0.15 else text


def untrained(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The package's encoder with a new head of one label, and its tokenizer."""
    model = BertForSequenceClassification.from_pretrained(folder, num_labels=1, use_safetensors=True)
    return model, AutoTokenizer.from_pretrained(folder)


def encoded(tokenizer: PreTrainedTokenizerBase, cuts: list[Cut]) -> dict[str, Tensor]:
    """`[CLS] opening [SEP] rest [SEP]`, the tokenizer's form for pairs, in which rgrl scores as well."""
    first, second = [cut[0] for cut in cuts], [cut[1] for cut in cuts]
    return tokenizer(first, second, padding=True, truncation=True, max_length=TOKENS, return_tensors="pt")


def tune(
    half: Half, folder: Path, state: Path, lora: bool, rounds: int
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """One squared error for all; with LoRA on every layer or whole. Kept in `state` every 100 steps."""
    torch.manual_seed(half.seed)
    model, tokenizer = untrained(folder)
    if lora:
        targets = [
            "query",
            "key",
            "value",
            "attention.output.dense",
            "intermediate.dense",
            "output.dense",
            "pooler.dense",
        ]
        config = LoraConfig(
            task_type="SEQ_CLS",
            r=16,
            lora_alpha=32,
            lora_dropout=0.0,
            target_modules=targets,
            modules_to_save=["classifier"],
        )
        model = get_peft_model(model, config)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rates = {True: 1e-3, False: 6e-4 if lora else 6e-5}
    groups = [
        {"params": [p for name, p in named.items() if ("classifier" in name) == head], "peak": rate}
        for head, rate in rates.items()
    ]
    optimizer = torch.optim.AdamW([{**group, "lr": 0.0} for group in groups], weight_decay=0.01)
    start = 0
    if state.exists():
        kept = torch.load(state, weights_only=True)
        start = kept["step"]
        model.load_state_dict(kept["weights"], strict=False)
        optimizer.load_state_dict(kept["optimizer"])
    model.train()
    average = 0.0
    plan = [(mix, i, steps) for steps, mix in (FIRST, *[LATER] * (rounds - 1)) for i in range(steps)]
    for step, (mix, i, steps) in list(enumerate(plan))[start:]:
        torch.manual_seed(half.seed * 1_000_003 + step)  # dropout, so that a resumed build is the same
        rows = list(half.draw(random.Random(f"{half.name}/encoder/{half.seed}/{step}"), mix))
        rows.sort(key=lambda row: sum(map(len, row[0])))
        total = 0.0
        for some in (
            rows[k : k + GROUP] for k in range(0, len(rows), GROUP)
        ):  # of like length: less padding to compute
            score_B = model(**encoded(tokenizer, [cut for cut, _ in some])).logits[:, 0]
            loss = (score_B - torch.tensor([target for _, target in some])).square().sum() / len(rows)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(list(named.values()), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * min(1.0, (i + 1) / 40) * (1 - i / steps)
        optimizer.step()
        optimizer.zero_grad()
        average = total if step == start else 0.97 * average + 0.03 * total
        if (step + 1) % 100 == 0 or step + 1 == len(plan):
            print(f"{half.name}'s encoder, step {step + 1}/{len(plan)} loss {average:.3f}", flush=True)
            weights = {name: p.detach() for name, p in named.items()}
            torch.save({"step": step + 1, "weights": weights, "optimizer": optimizer.state_dict()}, state)
    return model.eval(), tokenizer


@torch.no_grad()
def scores(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cuts: list[Cut]) -> list[float]:
    """The score of each text, in batches of equal length."""
    order = sorted(range(len(cuts)), key=lambda i: len(cuts[i][0]) + len(cuts[i][1]))
    found = [0.0] * len(cuts)
    for begin in range(0, len(order), 64):
        some = order[begin : begin + 64]
        for i, score in zip(
            some, model(**encoded(tokenizer, [cuts[i] for i in some])).logits[:, 0].tolist(), strict=True
        ):
            found[i] = score
    return found


def save(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    """An adapter with its head alone, or a whole model with its tokenizer."""
    if isinstance(model, PeftModel):
        model.peft_config["default"].base_model_name_or_path = "sentence-transformers/all-MiniLM-L6-v2"
        model.save_pretrained(out)
        (out / "README.md").unlink(missing_ok=True)  # an empty card of peft's
    else:
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)


def load(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    model = BertForSequenceClassification.from_pretrained(folder, use_safetensors=True)
    return model.eval(), AutoTokenizer.from_pretrained(folder)
