"""The small reward model and judge: what a tuned encoder says of a text, in 2 M parameters and the policy's tokens."""

import random
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from encoder import Cut, Half, random_cut, shortened
from optimise import train
from policies import SPECIALS, VOCAB
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Qwen3Config, Qwen3ForSequenceClassification

from rgrl.models.text import pad_left

LM_STEPS, STEPS, ROWS = 100, 560, 96
GROUP = 32  # rows of a forward pass
TOKENS = 56  # longest text


@dataclass(frozen=True)
class Shape:
    width: int
    layers: int
    seed: int


def to_label(half: Half, texts: list[str], prose: list[str]) -> list[Cut]:
    """What the teacher is asked about: real text, this half's kinds of broken text, rated words, samples."""
    rng = random.Random(f"{half.name}/labels/{half.seed}")
    movies = [text for text, _ in half.movies]
    cuts = [random_cut(rng, text) for text in texts] + [random_cut(rng, text) for text in rng.sample(prose, 1000)]
    for text in rng.sample(texts, 6000):
        made = rng.choice(half.corruptions)(rng, shortened(rng, text), rng.choice(movies), half.lexicon)
        if len(made.split()) > 1:
            cuts.append(random_cut(rng, made))
    starts = ("the film", "it is", "the plot", "this movie")
    cuts += [(rng.choice(starts), " " + word) for word in half.lexicon]
    return cuts + [cut for cut, _ in half.samples]


def framed(tokenizer: PreTrainedTokenizerBase, cuts: list[Cut]) -> tuple[Tensor, Tensor]:
    """Token ids and attention of (opening, rest) pairs in the chat format, left-padded."""
    rows = tokenizer([f"<|user|>{opening}<|assistant|>{rest}" for opening, rest in cuts])["input_ids"]
    ids_BL, attention_BL = pad_left([row[:TOKENS] for row in rows], torch.device("cpu"))
    return ids_BL, attention_BL.long()


def read_scores(model: torch.nn.Module, ids_BL: Tensor, attention_BL: Tensor) -> tuple[Tensor, Tensor]:
    """r_B at each row's last token, and the states for the next-token loss."""
    position_BL = (attention_BL.cumsum(1) - 1).clamp(min=0)
    states_BLD = model.model(input_ids=ids_BL, attention_mask=attention_BL, position_ids=position_BL).last_hidden_state
    return model.score(states_BLD[:, -1])[:, 0].float(), states_BLD


def next_token(model: torch.nn.Module, ids_BL: Tensor, attention_BL: Tensor, states_BLD: Tensor) -> Tensor:
    """Next-token cross-entropy, the input embeddings as output layer: it teaches words that no rating covered."""
    keep_BL = (attention_BL[:, :-1] > 0) & (attention_BL[:, 1:] > 0)
    logits_NV = F.linear(states_BLD[:, :-1][keep_BL], model.model.embed_tokens.weight).float()
    return F.cross_entropy(logits_NV, ids_BL[:, 1:][keep_BL])


def principal(embedding_VD: Tensor, width: int) -> Tensor:
    """The `width` directions in which the policy's embeddings differ most, at the size of fresh ones."""
    centred_VD = embedding_VD.float() - embedding_VD.float().mean(0)
    U, S, _ = torch.linalg.svd(centred_VD, full_matrices=False)
    kept_VD = U[:, :width] * S[:width]
    return kept_VD * (0.02 / kept_VD.std())


def build_student(
    shape: Shape,
    half: Half,
    tokenizer: PreTrainedTokenizerBase,
    embedding_VD: Tensor,
    labelled: list[tuple[Cut, float]],
    work: Path,
    out: Path,
) -> None:
    """A causal LM first, then one squared error on the teacher's scores, half of it on people's where there are any."""
    torch.manual_seed(shape.seed)
    heads = shape.width // 32
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=shape.width,
        intermediate_size=shape.width * 8 // 3 // 16 * 16,
        num_hidden_layers=shape.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=32,
        max_position_embeddings=256,
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3ForSequenceClassification(config)
    model.model.embed_tokens.weight.data.copy_(principal(embedding_VD, shape.width))
    rating = dict(half.movies + half.others)
    targets = [
        (cut, 0.5 * (score + rating[cut[0] + cut[1]]) if cut[0] + cut[1] in rating else score)
        for cut, score in labelled
    ]

    def loss_fn(model: torch.nn.Module, step: int) -> Tensor:
        rng = random.Random(f"{half.name}/student/{shape.seed}/{step}")
        rows = [rng.choice(targets) for _ in range(48 if step < LM_STEPS else ROWS)]
        rows.sort(key=lambda row: sum(map(len, row[0])))  # groups of like length: less padding to compute
        groups = [rows[i : i + GROUP] for i in range(0, len(rows), GROUP)]
        return torch.stack([summed(model, step, i, group) for i, group in enumerate(groups)]).sum() / len(rows)

    def summed(model: torch.nn.Module, step: int, i: int, rows: list[tuple[Cut, float]]) -> Tensor:
        ids_BL, attention_BL = framed(tokenizer, [cut for cut, _ in rows])
        if step < LM_STEPS:
            return len(rows) * next_token(model, ids_BL, attention_BL, read_scores(model, ids_BL, attention_BL)[1])
        # A tenth of the words is hidden, so that no text can be known by heart.
        hidden_BL = torch.rand(ids_BL.shape, generator=torch.Generator().manual_seed(8 * step + i)) < 0.1
        hidden_BL &= ids_BL < len(tokenizer) - len(SPECIALS)
        score_B, _ = read_scores(model, ids_BL.masked_fill(hidden_BL, tokenizer.mask_token_id), attention_BL)
        return (score_B - torch.tensor([target for _, target in rows])).square().sum()

    train(half.name, work, model, loss_fn, LM_STEPS + STEPS, learning_rate=2e-3, weight_decay=0.1)
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
