"""The vocabulary bridge: tokens are the same if they say the same bytes, in every kind of vocabulary."""

import json

import pytest
import torch
from checkpoints import PROMPTS, REPO
from transformers import AutoTokenizer
from vocabularies import KINDS, byte_level, sentence_piece, word_piece

from rgrl import load_classifier
from rgrl.models.families import LLADA
from rgrl.rewards.bridge import COMPOSED, EXACT, NAMES, SPECIAL, bridge_embeddings
from rgrl.types import Prompts

REVIEWS = REPO / "recipes" / "reviews"


@pytest.fixture(scope="module")
def tokenizers():
    return {name: make() for name, make in KINDS.items()}


@pytest.fixture(scope="module")
def llada_tokenizer():
    return LLADA.load_tokenizer(REVIEWS / "policy_llada")


def bridged(policy, reward, mode="compose", end_ids=()):
    """With a table of ones and zeros, so that a row shows which tokens it is the mean of."""
    return bridge_embeddings(
        policy, reward, torch.eye(len(reward)), max(policy.get_vocab().values()) + 1, mode, end_ids
    )


def pieces(row_U, tokenizer):
    """The reward tokens of a row with their shares."""
    return {tokenizer.convert_ids_to_tokens(int(j)): round(float(row_U[j]), 3) for j in row_U.nonzero()[:, 0]}


def row_of(policy, reward, token, **options):
    """The kind of one policy token, and the pieces of its row."""
    bridge_VU, coverage = bridged(policy, reward, **options)
    i = policy.convert_tokens_to_ids(token)
    return NAMES[coverage.kind_V[i]], pieces(bridge_VU[i], reward)


def mid_text(tokenizer, ids):
    """What the tokens add to a text, by the tokenizer's own decoding of a longer row."""
    head = tokenizer("x", add_special_tokens=False)["input_ids"]
    return tokenizer.decode([*head, *ids]).removeprefix(tokenizer.decode(head))


@pytest.mark.parametrize("reward_kind", KINDS)
@pytest.mark.parametrize("policy_kind", KINDS)
def test_an_exact_token_reads_the_same_and_a_composed_one_spells_the_same(policy_kind, reward_kind, tokenizers):
    policy, reward = tokenizers[policy_kind], tokenizers[reward_kind]
    bridge_VU, coverage = bridged(policy, reward)
    kinds = coverage.kind_V.tolist()
    for i, kind in enumerate(kinds):
        text = mid_text(policy, [i])
        if "\ufffd" in text or i in policy.all_special_ids:
            continue
        ids = bridge_VU[i].nonzero()[:, 0].tolist()
        if kind == EXACT:
            found = mid_text(reward, ids)
            if "word_piece" in (policy_kind, reward_kind) and not text.strip().isalnum():
                found, text = found.strip(), text.strip()  # BERT's decoding puts a space before a mark
            assert len(ids) == 1 and found == text, (text, pieces(bridge_VU[i], reward))
        elif kind == COMPOSED and text.strip():
            # Which letters there are; a row is a mean and has no order.
            said = text.lower() if reward_kind == "word_piece" else text
            found = "".join(mid_text(reward, [j]) for j in ids)
            assert set(found) - {" ", "\ufffd"} <= set(said), (text, pieces(bridge_VU[i], reward))
    assert kinds.count(EXACT) >= 180
    same = policy_kind == reward_kind
    assert coverage.same == same and (not same or kinds == [EXACT] * len(kinds))


def test_what_is_written_the_same_need_not_say_the_same():
    """`Ġthe` spelled out in a SentencePiece vocabulary is five letters, and `▁the` says what byte-level `Ġthe` says."""
    reward = sentence_piece(more=("Ġthe", "Ġ", "Ã"))
    policy = byte_level()
    assert "Ġthe" in reward.get_vocab() and "Ġthe" in policy.get_vocab()
    assert row_of(policy, reward, "Ġthe") == ("exact", {"▁the": 1.0})
    assert row_of(policy, reward, "Ġ") == ("exact", {"▁": 1.0})
    # The byte C3 begins a character; the letter Ã has two bytes.
    assert row_of(policy, reward, "Ã") == ("exact", {"<0xC3>": 1.0})
    assert row_of(reward, policy, "Ã")[0] == "composed" and set(row_of(reward, policy, "Ã")[1]) == {"Ã", "ĥ"}


def test_a_piece_of_a_word_is_spelled_as_inside_of_it():
    policy, pieced, spaced = byte_level(), word_piece(), sentence_piece()
    assert row_of(policy, pieced, "ing") == ("exact", {"##ing": 1.0})
    assert row_of(policy, pieced, "Ġfilm") == ("exact", {"film": 1.0})
    assert row_of(policy, pieced, "The") == ("composed", {"##t": 0.333, "##h": 0.333, "##e": 0.333})
    kind, found = row_of(policy, spaced, "lot")
    assert kind == "composed" and all(not piece.startswith("▁") for piece in found)


def test_half_a_character_is_its_bytes_or_unmatched_never_a_replacement_character(llada_tokenizer):
    made = byte_level()
    assert row_of(llada_tokenizer, made, "Ã") == ("exact", {"Ã": 1.0})
    half = AutoTokenizer.from_pretrained(REVIEWS / "reward")
    half.add_tokens(["\ufffd"])  # even where there is a token for it
    for reward, expected in ((half, ("exact", {"Ã": 1.0})), (word_piece(), ("unmatched", {"<unk>": 1.0}))):
        assert row_of(made, reward, "Ã") == expected
    assert row_of(made, word_piece(), "Ã", mode="zero") == ("unmatched", {})
    assert row_of(made, sentence_piece(), "Ã") == ("exact", {"<0xC3>": 1.0})


def test_several_bytes_without_a_character_are_spelled_by_the_merges():
    policy, reward = byte_level(), byte_level()
    backend = policy.backend_tokenizer
    # A token of the first two bytes of a character of three, as large vocabularies have them.
    made = json.loads(backend.to_str())
    made["model"]["vocab"]["âĢ"] = 900
    made["model"]["merges"].append(["â", "Ģ"])
    policy = type(policy)(tokenizer_object=type(backend).from_str(json.dumps(made)), eos_token="</s>")
    assert row_of(policy, reward, "âĢ") == ("composed", {"â": 0.5, "Ģ": 0.5})
    kind, found = row_of(policy, sentence_piece(), "âĢ")
    assert kind == "composed" and set(found) == {"<0xE2>", "<0x80>"}


def test_special_tokens_are_shown_as_those_of_the_same_name_or_not_at_all(llada_tokenizer):
    reward = AutoTokenizer.from_pretrained(REVIEWS / "reward")
    end, turn, mask, head = llada_tokenizer.convert_tokens_to_ids(
        ["<|endoftext|>", "<|eot_id|>", "<|mdm_mask|>", "<|start_header_id|>"]
    )
    for mode in ("compose", "unknown", "zero"):
        bridge_VU, coverage = bridged(llada_tokenizer, reward, mode, {end, turn})
        assert coverage.kind_V[end] == EXACT and pieces(bridge_VU[end], reward) == {"<|endoftext|>": 1.0}
        shown = {"<|endoftext|>": 1.0} if mode == "compose" else {}
        assert coverage.kind_V[turn] == SPECIAL and pieces(bridge_VU[turn], reward) == shown
        for i in (mask, head):
            assert coverage.kind_V[i] == SPECIAL and not bridge_VU[i].any()
    assert coverage.counts()["special"] == 5


def test_a_word_that_is_written_like_a_special_token_is_text():
    policy, reward = byte_level(), byte_level()
    policy.add_tokens(["<b>", "</s> "])
    reward.add_special_tokens({"additional_special_tokens": ["<b>"]})
    kind, found = row_of(policy, reward, "<b>")
    assert kind == "composed" and set(found) == {"<", "b", ">"}
    assert set(row_of(policy, reward, "</s> ")[1]) == {"<", "/", "s", ">", "Ġ"}


def test_a_control_token_of_the_reward_model_is_spelled_even_where_it_is_not_special():
    policy, reward = byte_level(), byte_level()
    for tokenizer in (policy, reward):
        tokenizer.add_tokens(["<b>", "<i>"])
    reward.chat_template = "{% for m in messages %}<b>{{ m.content }}{% endfor %}"
    assert row_of(policy, reward, "<b>") == ("composed", {"<": 0.333, "b": 0.333, ">": 0.333})
    assert row_of(policy, reward, "<i>") == ("exact", {"<i>": 1.0})


def test_what_the_scorer_tokenises_otherwise_is_noticed(llada_tokenizer):
    reward = load_classifier(REVIEWS / "reward")
    reward.bind(reward.tokenizer, len(reward.tokenizer))
    prompts = Prompts([PROMPTS[0]] * 4, [{}] * 4)
    whole = reward.tokenizer(" is funny and moving", add_special_tokens=False)["input_ids"]
    letters = [reward.tokenizer.convert_tokens_to_ids(letter) for letter in "Ġfunny"]
    special = reward.tokenizer.convert_tokens_to_ids("<|user|>")
    rows = [whole, letters, [*whole[:1], special, *whole[1:]], []]
    texts = [reward.tokenizer.decode(row, skip_special_tokens=True) for row in rows]
    assert reward.retokenised(prompts, rows, texts) == [False, True, False, False]
    reward.bind(llada_tokenizer, len(llada_tokenizer))
    texts = [" works well.", " doesn't work at all."]
    rows = llada_tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert reward.retokenised(prompts.take([0, 1]), rows, texts) == [False, True]


def test_a_table_with_fewer_rows_than_tokens_is_not_read_beyond():
    policy, reward = byte_level(), byte_level()
    bridge_VU, coverage = bridge_embeddings(policy, reward, torch.eye(len(reward))[:500], len(policy) + 7, "compose")
    assert len(bridge_VU) == len(policy) + 7
    assert coverage.counts()["special"] == 7 + 2  # rows without a token, and special tokens beyond the table
    assert (coverage.kind_V[:500] == EXACT).all() and not bridge_VU[:, 500:].any()


def test_what_is_guided_is_what_is_scored_where_the_tokens_are_the_same(llada_tokenizer):
    """Measured with the shipped models: equal for exact tokens; a word composed of others is near, not the same."""
    reward = load_classifier(REVIEWS / "reward").bind(llada_tokenizer, len(llada_tokenizer))
    texts = [" is a funny and moving look at love.", " works well.", " doesn't work at all.", " is well-made fun"]
    prompts = Prompts([PROMPTS[0]] * len(texts), [{}] * len(texts))
    rows = llada_tokenizer(texts, add_special_tokens=False)["input_ids"]
    ids_BC = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    shown_BC = torch.zeros_like(ids_BC, dtype=torch.bool)
    for b, row in enumerate(rows):
        ids_BC[b, : len(row)], shown_BC[b, : len(row)] = torch.tensor(row), True
    guided_B = reward.for_prompts(prompts)(reward.embedding_VD[ids_BC], shown_BC, torch.arange(len(texts)))
    apart_B = (guided_B - reward.score(prompts, texts).reward_B).abs()
    exact_B = ((reward.coverage.kind_V[ids_BC] == EXACT) | ~shown_BC).all(1)
    same = [llada_tokenizer.tokenize(t) == reward.tokenizer.tokenize(t) for t in texts]
    assert exact_B.tolist() == same == [True, True, False, False]
    assert apart_B[:2].max() < 1e-4
    assert apart_B[2:].min() > 1e-2
