"""Rewards: guiding and scoring agree, the gradient is the uncached one, and the vocabulary bridge is as documented."""

import peft
import pytest
import torch
from checkpoints import PROMPTS, TOKENIZER, write_reward
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast, Qwen2Tokenizer

from rgrl.config import Config, GuidanceConfig, RewardConfig
from rgrl.errors import ConfigError
from rgrl.rewards import Rewards, load_classifier, load_rewards
from rgrl.rewards.bridge import NAMES, bridge_embeddings
from rgrl.types import Prompts

TEMPLATES = {
    "no template": "",
    "template": "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}",
    "template with an ending": "{% for m in messages %}<|{{ m.role }}|>{{ m.content }} ok<|user|>{% endfor %}",
}
TEXTS = ["this movie", "the plot of this film is, as a thriller,", "it", "it"]  # the last two share their prefix
COMPLETIONS = [" is hard to watch, despite the acting", "", " good", " bad, and too long"]


@pytest.fixture(scope="module", params=TEMPLATES)
def folder(request, tmp_path_factory):
    folder = write_reward(tmp_path_factory.mktemp("r"), template=TEMPLATES[request.param])
    (folder / "which.txt").write_text(request.param)
    return folder


@pytest.fixture(scope="module")
def reward(folder):
    return load_classifier(folder)


PROMPTED = Prompts(TEXTS, [{} for _ in TEXTS])


def expected_rows(reward, folder):
    """Token ids before, of and after each completion, with the template written out by hand."""
    before, after = {
        "no template": ("{}\n", ""),
        "template": ("<|user|>{}<|assistant|>", ""),
        "template with an ending": ("<|user|>{} ok<|user|><|assistant|>", " ok<|user|>"),
    }[(folder / "which.txt").read_text()]
    texts = [(before.format(p), c, after) for p, c in zip(TEXTS, COMPLETIONS, strict=True)]
    return [[reward.tokenizer(part, add_special_tokens=False)["input_ids"] for part in row] for row in texts]


def as_embeddings(reward):
    """The completions as embeddings, padded on the right with noise that must not count."""
    ids = [reward.tokenizer(c, add_special_tokens=False)["input_ids"] for c in COMPLETIONS]
    C = max(map(len, ids)) + 2
    table = reward.model.get_input_embeddings().weight.detach()
    response_BCD = torch.randn(len(ids), C, table.shape[1], generator=torch.Generator().manual_seed(0))
    attention_BC = torch.zeros(len(ids), C, dtype=torch.bool)
    for b, row in enumerate(ids):
        response_BCD[b, : len(row)] = table[row]
        attention_BC[b, : len(row)] = True
    return response_BCD, attention_BC


def guided(reward, response_BCD, attention_BC, prompts):
    """The reward of one response a prompt, given as embeddings."""
    return reward.for_prompts(prompts)(response_BCD, attention_BC, torch.arange(len(prompts)))


@torch.no_grad()
def scores_of(model, reward, folder):
    """By transformers' own classifier, of the whole texts."""
    rows = [before + completion + after for before, completion, after in expected_rows(reward, folder)]
    return torch.stack([model(torch.tensor([ids])).logits[0, 0] for ids in rows])


def test_score_is_transformers_own_score_of_the_whole_text(folder, reward):
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    score_B = reward.score(PROMPTED, COMPLETIONS).reward_B
    assert score_B.dtype == torch.float32 and score_B.std() > 0.05
    torch.testing.assert_close(score_B, scores_of(model, reward, folder), rtol=0, atol=1e-5)


def test_embedded_tokens_get_the_score_of_their_text(reward):
    response_BCD, attention_BC = as_embeddings(reward)
    score_B = reward.score(PROMPTED, COMPLETIONS).reward_B
    r_B = guided(reward, response_BCD, attention_BC, PROMPTED)
    torch.testing.assert_close(r_B, score_B, rtol=0, atol=1e-5)
    prompted = reward.for_prompts(PROMPTED)
    for _ in range(2):  # the cached prefix is not used up
        r_B = prompted(response_BCD, attention_BC, torch.arange(len(score_B)))
        torch.testing.assert_close(r_B, score_B, rtol=0, atol=1e-5)
    some_A = torch.tensor([0, 2])
    r_A = prompted(response_BCD[some_A], attention_BC[some_A], some_A)
    torch.testing.assert_close(r_A, score_B[some_A], rtol=0, atol=1e-5)


def test_all_completions_empty(reward):
    D = reward.model.config.hidden_size
    nothing_B = guided(reward, torch.randn(4, 3, D), torch.zeros(4, 3, dtype=torch.bool), PROMPTED)
    torch.testing.assert_close(nothing_B, reward.score(PROMPTED, [""] * 4).reward_B, rtol=0, atol=1e-5)


def test_gradient_is_that_of_the_whole_uncached_forward_pass(folder, reward):
    response_BCD, attention_BC = as_embeddings(reward)
    response_BCD += 0.1 * torch.randn(response_BCD.shape, generator=torch.Generator().manual_seed(1))  # no real token
    weight_B = torch.tensor([1.0, 2.0, -1.0, 0.5])

    fast_BCD = response_BCD.clone().requires_grad_()
    (weight_B * guided(reward, fast_BCD, attention_BC, PROMPTED)).sum().backward()

    slow_BCD = response_BCD.clone().requires_grad_()
    table = reward.model.get_input_embeddings().weight
    for b, (before, _, after) in enumerate(expected_rows(reward, folder)):
        row_LD = torch.cat([table[before], slow_BCD[b][attention_BC[b]], table[torch.tensor(after, dtype=torch.long)]])
        (weight_B[b] * reward.model(inputs_embeds=row_LD[None]).logits[0, 0]).backward()
    assert slow_BCD.grad[0].abs().max() > 1e-3
    torch.testing.assert_close(fast_BCD.grad, slow_BCD.grad, rtol=0, atol=1e-5)
    assert (fast_BCD.grad[~attention_BC] == 0).all()
    assert all(p.grad is None for p in reward.model.parameters())  # the weights stay frozen


# The vocabulary bridge


@pytest.fixture(scope="module")
def policy_tokenizer():
    return Qwen2Tokenizer.from_pretrained(TOKENIZER)


@pytest.fixture(scope="module")
def small_tokenizer():
    """A byte-level BPE of its own with few merges, so that most of the policy's tokens have to be spelled."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<end>", "<unk>"])
    tokenizer.train_from_iterator(PROMPTS * 5, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", unk_token="<unk>")


def test_bridge_of_the_same_tokenizer_is_the_identity(reward_dir, policy_tokenizer):
    reward = load_classifier(reward_dir)
    for mode in ("compose", "unknown", "zero"):
        reward.bind(policy_tokenizer, 4096, mode)
        assert torch.equal(reward.embedding_VD, reward.model.get_input_embeddings().weight[:4096])
        assert reward.coverage.same
        assert reward.coverage.counts() == {"exact": 4096, "composed": 0, "unmatched": 0, "special": 0}


@pytest.mark.parametrize("mode", ["compose", "unknown", "zero"])
def test_bridge_to_another_tokenizer(mode, policy_tokenizer, small_tokenizer):
    table_UD = torch.randn(len(small_tokenizer), 5, generator=torch.Generator().manual_seed(0))
    bridge_VD, coverage = bridge_embeddings(policy_tokenizer, small_tokenizer, table_UD, 4096, mode)
    vocabulary = small_tokenizer.get_vocab()
    seen, expected = dict.fromkeys(NAMES, 0), []
    for i, token in enumerate(policy_tokenizer.convert_ids_to_tokens(range(4096))):
        pieces = [] if i >= 4092 else small_tokenizer.backend_tokenizer.encode(policy_tokenizer.decode([i])).tokens
        if i >= 4092:  # no special token of the same name
            kind, expected_D = "special", torch.zeros(5)
        elif token in vocabulary:
            kind, expected_D = "exact", table_UD[vocabulary[token]]
        elif mode == "compose":  # the pieces spell the very bytes of the token
            assert "".join(pieces) == token
            kind, expected_D = "composed", torch.stack([table_UD[vocabulary[p]] for p in pieces]).mean(0)
        else:
            unknown_D = table_UD[small_tokenizer.unk_token_id]
            kind, expected_D = "unmatched", unknown_D if mode == "unknown" else torch.zeros(5)
        expected.append(expected_D)
        assert NAMES[coverage.kind_V[i]] == kind
        seen[kind] += 1
    torch.testing.assert_close(bridge_VD, torch.stack(expected))
    assert coverage.counts() == seen and sum(seen.values()) == 4096 and not coverage.same
    assert seen["exact"] > 200 and seen["composed" if mode == "compose" else "unmatched"] > 3000


def test_bridge_without_an_unknown_token_uses_the_end_token(policy_tokenizer, small_tokenizer):
    no_unknown = PreTrainedTokenizerFast(tokenizer_object=small_tokenizer.backend_tokenizer, eos_token="<end>")
    table_UD = torch.randn(len(no_unknown), 5, generator=torch.Generator().manual_seed(0))
    bridge_VD, _ = bridge_embeddings(policy_tokenizer, no_unknown, table_UD, 4096, "unknown")
    word = policy_tokenizer.convert_tokens_to_ids("Ġperformances")
    assert torch.equal(bridge_VD[word], table_UD[no_unknown.eos_token_id])


# Sums of rewards


def length_of(prompts, completions, rows):
    return [float(len(c)) for c in completions]


def from_row(prompts, completions, rows):
    return [row["bonus"] for row in rows]


def fails_on_bad(prompts, completions, rows):
    return [float("nan") if "bad" in c else 1.0 for c in completions]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_value_that_is_not_finite_is_an_error_that_shows_the_text(value):
    rewards = Rewards(None, {"f": lambda p, c, r: [1.0, 2.0, 3.0, value]}, {"f": 1.0})
    with pytest.raises(ConfigError) as caught:
        rewards.score(PROMPTED, COMPLETIONS)
    assert COMPLETIONS[3] in str(caught.value) and "'f'" in str(caught.value) and repr(TEXTS[3]) in str(caught.value)


NOT_FOUR = [[1.0, 2.0], None, "good", "1234", {0: 1.0, 1: 2.0, 2: 3.0, 3: 4.0}, {1.0, 2.0, 3.0, 4.0}, [1j] * 4]
NOT_FOUR += [iter(int, 1), [10**400] * 4, ["1"] * 4, torch.ones(4, 1), torch.ones(4) * 1j, 1.0, object(), [[1.0]] * 4]


@pytest.mark.parametrize("values", NOT_FOUR, ids=range(len(NOT_FOUR)))
def test_anything_but_one_number_per_completion_is_an_error_that_names_the_reward(values):
    rewards = Rewards(None, {"f": lambda p, c, r: values}, {"f": 1.0})
    with pytest.raises(ConfigError, match="'f'"):
        rewards.score(PROMPTED, COMPLETIONS)


def test_total_is_the_weighted_sum_of_model_and_functions(folder, reward):
    functions = {"test_rewards:length_of": -0.5, "test_rewards:from_row": 3.0}
    config = Config(reward=RewardConfig(path=str(folder), name="rm", weight=2.0, functions=functions))
    rewards, _ = load_rewards(config, "cpu")
    rows = [{"bonus": b} for b in (1.0, 2.0, 3.0, 4.0)]
    found = rewards.score(Prompts(TEXTS, rows), COMPLETIONS)
    total_B, terms = found.total_B, found.terms
    assert set(terms) == {"rm", "length_of", "from_row"}
    model_B = reward.score(PROMPTED, COMPLETIONS).reward_B
    torch.testing.assert_close(terms["rm"], model_B)
    assert terms["length_of"].tolist() == [len(c) for c in COMPLETIONS]
    expected = [
        2 * m - 0.5 * len(c) + 3 * r["bonus"] for m, c, r in zip(model_B.tolist(), COMPLETIONS, rows, strict=True)
    ]
    torch.testing.assert_close(total_B, torch.tensor(expected), rtol=0, atol=1e-5)


UNGUIDED = GuidanceConfig(kind="none")


def test_functions_alone_need_no_model():
    config = Config(reward=RewardConfig(functions={"test_rewards:length_of": 2.0}), guidance=UNGUIDED)
    rewards, guide = load_rewards(config, "cpu")
    assert guide is None and rewards.model is None
    assert rewards.score(PROMPTED, COMPLETIONS).total_B.tolist() == [2.0 * len(c) for c in COMPLETIONS]


@pytest.mark.parametrize("path", ["no_such_module_here:f", "test_rewards:no_such_function", "length_of"])
def test_reward_function_that_cannot_be_found_is_named(path):
    config = Config(reward=RewardConfig(functions={path: 1.0}), guidance=UNGUIDED)
    with pytest.raises(ConfigError, match=path):
        load_rewards(config, "cpu")


def test_guide_shares_the_scorers_weights_where_it_is_the_same_model(reward_dir, judge_dir):
    def load(guidance):
        return load_rewards(Config(reward=RewardConfig(path=str(reward_dir)), guidance=guidance), "cpu")

    for guidance in (GuidanceConfig(), GuidanceConfig(path=str(reward_dir))):
        rewards, guide = load(guidance)
        assert guide is rewards.model and guide is not None
    rewards, guide = load(GuidanceConfig(path=str(judge_dir)))
    assert guide is not None and guide is not rewards.model
    assert not torch.equal(
        guide.score(PROMPTED, COMPLETIONS).reward_B, rewards.model.score(PROMPTED, COMPLETIONS).reward_B
    )
    assert load(UNGUIDED)[1] is None


def test_lora_adapter_of_the_reward_model_is_merged(folder, reward, tmp_path):
    base = AutoModelForSequenceClassification.from_pretrained(folder)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="SEQ_CLS")
    adapted = peft.get_peft_model(base, config)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():  # as after training: B is not zero, and the score head, saved with the adapter, has moved
        for p in adapted.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn(p.shape, generator=rng))
    adapted.eval().save_pretrained(tmp_path / "adapter")
    merged = load_classifier(folder, adapter=str(tmp_path / "adapter"))
    assert not any("lora" in name for name, _ in merged.named_parameters())
    expected_B = scores_of(adapted, merged, folder)
    torch.testing.assert_close(merged.score(PROMPTED, COMPLETIONS).reward_B, expected_B, rtol=0, atol=1e-5)
    assert (reward.score(PROMPTED, COMPLETIONS).reward_B - expected_B).abs().max() > 0.01
    # Merging must leave the path for guidance intact.
    guided_B = guided(merged, *as_embeddings(merged), PROMPTED)
    torch.testing.assert_close(guided_B, expected_B, rtol=0, atol=1e-5)


def test_what_is_not_a_reward_model_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="2 labels"):
        load_classifier(write_reward(tmp_path / "two", labels=2))
    with pytest.raises(ConfigError, match="no such folder"):
        load_classifier(tmp_path / "absent")
    with pytest.raises(ConfigError, match=r"adapter_config\.json"):
        load_classifier(write_reward(tmp_path / "one"), adapter=str(tmp_path))
