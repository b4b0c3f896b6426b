"""Small tokenizers of every kind, trained on the recipe's prompts."""

import json

from checkpoints import REPO
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = [json.loads(line)["prompt"] for line in (REPO / "recipes" / "reviews" / "train.jsonl").open()]
TEXTS += [text.capitalize() + "." for text in TEXTS]
SPECIALS = ["<unk>", "</s>"]


def byte_level(size: int = 600) -> PreTrainedTokenizerFast:
    """As GPT-2, Qwen2, Llama 3, Dream and LLaDA."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return _trained(tokenizer, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False))


def sentence_piece(size: int = 600, more: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """As Llama 2 and Gemma: spaces are letters, and an unknown character is its bytes. `more` are further tokens."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    trained = _trained(tokenizer, trainers.BpeTrainer(vocab_size=size, show_progress=False, special_tokens=SPECIALS))
    made = json.loads(trained.backend_tokenizer.to_str())
    for token in (*fallback, *more):
        made["model"]["vocab"].setdefault(token, len(made["model"]["vocab"]))
    return _fast(Tokenizer.from_str(json.dumps(made)))


def unigram(size: int = 400) -> PreTrainedTokenizerFast:
    """As T5, XLM-RoBERTa and DeBERTa-v3."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return _trained(
        tokenizer,
        trainers.UnigramTrainer(vocab_size=size, unk_token="<unk>", special_tokens=SPECIALS, show_progress=False),
    )


def word_piece(size: int = 600) -> PreTrainedTokenizerFast:
    """As BERT, in lower case."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return _trained(tokenizer, trainers.WordPieceTrainer(vocab_size=size, special_tokens=SPECIALS, show_progress=False))


KINDS = {"byte_level": byte_level, "sentence_piece": sentence_piece, "unigram": unigram, "word_piece": word_piece}


def _trained(tokenizer: Tokenizer, trainer: trainers.Trainer) -> PreTrainedTokenizerFast:
    tokenizer.train_from_iterator(TEXTS, trainer)
    return _fast(tokenizer)


def _fast(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")
