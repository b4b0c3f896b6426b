"""How a policy reads: its tokenizer, its chat template, and the tokens that end an answer. No weights are needed."""

from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerBase

from rgrl.errors import ConfigError
from rgrl.models.families import Family
from rgrl.models.text import check_shape, control_tokens, count_tokens, guarded, render, wants_parts
from rgrl.types import Prompt, turns_of


class Reader:
    """A policy's tokenizer and what is made of text with it.

    `vocab_size` V counts the tokens that can be decoded: `table` is the number of embeddings, which may be more.
    `max_length` is the longest canvas in tokens. Raises `ConfigError` for a tokenizer without an end-of-text token.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, family: Family, mask_id: int, table: int, max_length: int
    ) -> None:
        self.tokenizer, self.mask_id, self.max_length = tokenizer, mask_id, max_length
        if tokenizer.eos_token_id is None:
            raise ConfigError("the policy's tokenizer has no end-of-text token")
        self.eos_id: int = tokenizer.eos_token_id
        turn = tokenizer.convert_tokens_to_ids(family.end_of_turn)
        known = turn is not None and turn != tokenizer.unk_token_id and turn != self.eos_id
        self.end_ids: tuple[int, ...] = (self.eos_id, turn) if known else (self.eos_id,)
        self.vocab_size = min(len(tokenizer), table)
        if not tokenizer.chat_template:
            tokenizer.chat_template = family.chat_template
        self.controls = control_tokens(tokenizer, tokenizer.convert_ids_to_tokens([mask_id, *self.end_ids]))
        self.in_parts = wants_parts(tokenizer, ("user",))

    def end_with(self, ids: Iterable[int]) -> None:
        """Take these tokens for ends of a completion too."""
        self.end_ids += tuple(sorted(set(ids) - set(self.end_ids)))

    def format_prompt(self, prompt: Prompt) -> str:
        """A user turn, or a chat, in the model's chat format, up to where the answer begins.

        A control token that the text spells, such as the mask or the end of a turn, stays text.
        """
        turns = [{**turn, "content": guarded(turn["content"], self.controls)} for turn in turns_of(prompt)]
        return render(self.tokenizer, turns, self.in_parts, answer=True)

    def check_shape(self, roles: Sequence[str]) -> None:
        """Raise `ConfigError` unless the template shows every turn of such a chat, in its order."""
        check_shape(self.tokenizer, roles, self.in_parts)

    def lengths(self, inputs: Sequence[str]) -> list[int]:
        """Tokens of each formatted prompt."""
        return count_tokens(self.tokenizer, inputs)

    def text_lengths(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text by itself, without a template. Tokenizers drop some characters: there may be none."""
        return self.lengths([guarded(text, self.controls) for text in texts])
