"""Guide = scorer = the model's own forward pass, for every architecture that is accepted; others are refused."""

import pytest
import torch
from architectures import ARCHITECTURES, write_architecture
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rgrl.errors import ConfigError
from rgrl.rewards import load_classifier
from rgrl.types import Prompts

# Some are longer than the tests' windows (8 tokens), some shorter.
TEXTS = ["the plot of this film is, as a thriller, hard to follow from the first scene on", "it", "this movie, then"]
COMPLETIONS = [" good", " is hard to watch, despite the acting, and much too long for what it has to say", ""]
PROMPTS = Prompts(TEXTS, [{} for _ in TEXTS])


def own_scores(folder):
    """transformers' own class on one text at a time, tokenised whole, without padding."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    scores = []
    for prompt, completion in zip(TEXTS, COMPLETIONS, strict=True):
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            scores.append(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, 0])
    return torch.stack(scores)


def as_embeddings(reward):
    """The completions as embeddings, padded with noise that must not count."""
    ids = [reward.tokenizer(text, add_special_tokens=False)["input_ids"] for text in COMPLETIONS]
    C, table_VD = max(map(len, ids)) + 2, reward.embedding_VD
    response_BCD = torch.randn(len(ids), C, table_VD.shape[1], generator=torch.Generator().manual_seed(0))
    shown_BC = torch.zeros(len(ids), C, dtype=torch.bool)
    for b, row in enumerate(ids):
        response_BCD[b, : len(row)] = table_VD[row]
        shown_BC[b, : len(row)] = True
    return response_BCD, shown_BC


def guided(reward, response_BCD, shown_BC):
    """The reward of a response to each prompt, given as embeddings."""
    return reward.for_prompts(PROMPTS)(response_BCD, shown_BC, torch.arange(len(PROMPTS)))


# Some configs name no padding: transformers' classes then take one text at a time.
CASES = [(name, True) for name in ARCHITECTURES] + [(name, False) for name in ("llama", "gpt2", "qwen3 window")]


@pytest.mark.parametrize(("name", "pad"), CASES, ids=[f"{name}{'' if pad else ', no pad'}" for name, pad in CASES])
def test_guide_scorer_and_own_forward_pass_agree(name, pad, tmp_path):
    backend = ARCHITECTURES[name][2]
    folder = write_architecture(tmp_path / "r", name, pad)
    if backend == "refused":
        with pytest.raises(ConfigError, match="cannot score") as refused:
            load_classifier(folder)
        assert "\n" not in str(refused.value) and len(str(refused.value)) < 400
        return
    reward = load_classifier(folder)
    assert reward.backend == backend, reward.reasons
    reward.bind(reward.tokenizer, len(reward.tokenizer))
    truth_B = own_scores(folder)
    assert truth_B.std() > 0.01
    torch.testing.assert_close(reward.score(PROMPTS, COMPLETIONS).reward_B, truth_B, atol=1e-4, rtol=1e-4)

    response_BCD, shown_BC = as_embeddings(reward)
    response_BCD.requires_grad_()
    guided_B = guided(reward, response_BCD, shown_BC)
    torch.testing.assert_close(guided_B.detach(), truth_B, atol=1e-4, rtol=1e-4)

    # The gradient, against the change of the reward along a random direction.
    (g_BCD,) = torch.autograd.grad(guided_B.sum(), response_BCD)
    assert g_BCD[~shown_BC].abs().max() == 0
    step_BCD = 2e-3 * torch.randn(response_BCD.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        up_B, down_B = (guided(reward, response_BCD + s * step_BCD, shown_BC) for s in (1, -1))
    torch.testing.assert_close((g_BCD * step_BCD).sum((1, 2)), (up_B - down_B) / 2, atol=1e-4, rtol=3e-2)
