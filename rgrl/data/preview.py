"""Show what a run would make of its data, without loading any weights: `rgrl data`."""

from collections.abc import Iterator

import torch
from transformers import PreTrainedTokenizerBase

from rgrl.config import Config
from rgrl.data.lengths import check_shapes, fit_both
from rgrl.data.prompts import PromptSet, load_data
from rgrl.data.said import empty_prompt
from rgrl.models.load import load_reader
from rgrl.models.reader import Reader
from rgrl.models.text import token_ids
from rgrl.rewards.bridge import bridge_embeddings
from rgrl.rewards.checkpoint import load_template
from rgrl.rewards.template import InputTemplate
from rgrl.types import Prompt, transcript

MEASURED = 10_000  # prompts whose lengths are measured
COMPLETION = "[completion]"


def preview(config: Config, first: int) -> Iterator[str]:
    """Texts to print: counts, lengths, coverage, and the `first` prompts as policy and reward models would see them.

    Raises `ConfigError` as a run with these settings would.
    """
    training, evaluation = load_data(config.data, evaluates=config.run.eval_steps > 0)
    reader, templates = load_reader(config.model), _templates(config)
    training, evaluation = fit_both(training, evaluation, reader, config.rollout.max_completion_length)
    data = {"training": training} | ({} if evaluation is None else {"evaluation": evaluation})
    for prompts in data.values():
        for template, _ in templates.values():
            check_shapes(prompts, template.check_shape)
    for name, prompts in data.items():
        yield _summary(name, prompts, reader)
    yield from _coverage(config, reader, templates)
    for name, prompts in data.items():
        for i in range(min(first, len(prompts))):
            yield _shown(name, prompts, i, reader, {use: template for use, (template, _) in templates.items()})


def _templates(config: Config) -> dict[str, tuple[InputTemplate, int]]:
    """The input template of each reward model, and its number of embeddings, by what it is used for."""
    c, found = config, dict[str, tuple[InputTemplate, int]]()
    if c.reward.path is not None:
        found["reward"] = load_template(c.reward.path, c.reward.name, c.reward.max_length, c.reward.revision)
    if c.guidance.path is not None and _guides(c):
        found["guide"] = load_template(c.guidance.path, "guide", c.reward.max_length, c.guidance.revision)
    if c.judge.path is not None:
        found["judge"] = load_template(c.judge.path, "judge", c.judge.max_length, c.judge.revision)
    for template, _ in found.values():
        template.make_room(c.rollout.max_completion_length, empty_prompt(c.data))
    return found


def _guides(config: Config) -> bool:
    """Whether the guide steers rollouts, or gives the update its gradient."""
    g = config.gradient
    return config.guidance.kind != "none" or (g.weight > 0 and g.of == "guide")


def _summary(name: str, prompts: PromptSet, reader: Reader) -> str:
    """Numbers of rows and prompts, what was left out or cut, columns and lengths."""
    lengths: list[int] = []
    for batch in prompts.batches():
        lengths += reader.lengths(batch.inputs)
        if len(lengths) >= MEASURED:
            break
    tokens = torch.tensor(lengths, dtype=torch.float32)
    half, most = tokens.quantile(0.5), tokens.quantile(0.95)
    of = f" of the first {len(lengths):,}" if len(lengths) < len(prompts) else ""
    left_out = prompts.tally.words()
    return "\n".join(
        [
            f"{name} data: {prompts.source}{f' at commit {prompts.data.commit}' if prompts.data.commit else ''}",
            f"  {prompts.tally.rows:,} rows, {len(prompts):,} prompts{f'; {left_out}' if left_out else ''}",
            f"  columns: {', '.join(prompts.columns)}",
            f"  policy tokens{of}: median {half:.0f}, 95 % {most:.0f}, longest {max(lengths)}, limit "
            f"{prompts.config.max_prompt_length} (`data.max_prompt_length`)",
        ]
    )


def _coverage(config: Config, reader: Reader, templates: dict[str, tuple[InputTemplate, int]]) -> Iterator[str]:
    """How the guide sees the policy's tokens, if there is one."""
    use = "guide" if "guide" in templates else "reward"
    if not (_guides(config) or config.gradient.weight > 0) or use not in templates:
        return
    template, size = templates[use]
    ends = {*reader.end_ids, reader.eos_id}
    table_UD = torch.zeros(size, 1)  # how tokens are matched does not depend on their embeddings
    _, coverage = bridge_embeddings(
        reader.tokenizer, template.tokenizer, table_UD, reader.vocab_size, config.reward.bridge, ends
    )
    yield f"guide model {template.name}: {'the same tokens as the policy' if coverage.same else coverage}"


def _shown(name: str, prompts: PromptSet, i: int, reader: Reader, templates: dict[str, InputTemplate]) -> str:
    """Prompt `i` as each model sees it, decoded from its tokens, with their numbers and what was cut."""
    number = int(prompts.number_P[i])
    batch = prompts.take([i])
    cut = prompts.cuts.get(number)
    lost = f"; cut: {cut.turns} of its oldest turns, {cut.characters:,} characters" if cut is not None else ""
    row = prompts.data.told(number, "").replace("  ", " ").strip()
    count = reader.lengths(batch.inputs)[0]
    lines = [f"\n--- {name} prompt {i + 1} of {len(prompts):,}, {row}{lost}", f"policy, {count} tokens:"]
    lines.append(visible(decoded(reader.tokenizer, token_ids(reader.tokenizer, batch.inputs[0]))))
    for use, template in templates.items():
        lines += _encoded(use, template, batch.chats[0])
    return "\n".join(lines)


def _encoded(use: str, template: InputTemplate, prompt: Prompt) -> list[str]:
    before, after = template.around(prompt)
    rest = template.fit(prompt)
    lost = len(transcript(prompt)) - len(transcript(rest))
    cut = f", cut: {lost:,} characters of its beginning" if rest != prompt else ""
    text = f"{decoded(template.tokenizer, before.ids)}{COMPLETION}{decoded(template.tokenizer, after.ids)}"
    return [f"{use} model {template.name}, {len(before) + len(after)} tokens and the completion{cut}:", visible(text)]


def decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """The text of tokens, control tokens included."""
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def visible(text: str) -> str:
    """The text indented, with characters that a terminal would obey written out."""
    shown = "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
    return "\n".join(f"  | {line}" for line in shown.split("\n"))
