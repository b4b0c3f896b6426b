"""What a rising reward must not cost: how much completions still differ, what word they share, and if there are any.

Plain Python on texts. `distinct` splits at spaces, as its literature does, punctuation included. `top_word` looks at
letters alone: a word is a run of letters in lower case, with apostrophes inside; of scripts that are written without
spaces between words, each Chinese or Japanese character is one, and elsewhere each run of letters.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Hashable, Sequence
from itertools import chain

# English words that say how others belong together. In other languages, and for what a data set is about, the prompts
# tell: see `_common`.
FUNCTION_WORDS = frozenset(
    """
    a an the this that these those such same other another each every either neither both all any some no none
    i me my mine myself we us our ours ourselves you your yours yourself yourselves he him his himself she her hers
    herself it its itself they them their theirs themselves one who whom whose which what whatever whoever
    something anything nothing everything someone anyone everyone nobody
    be am is are was were been being do does did done doing have has had having can could will would shall should may
    might must ought cannot
    and or but nor so yet if unless though although because since while whereas whether as than then
    of in on at by for from to into onto with within without about above across after against along among around before
    behind below beneath beside besides between beyond despite down during except like near off out over past per
    through throughout till toward towards under until up upon via
    not too also just only even ever never still again here there now when whenever where wherever why how
    more most less least much many few fewer several enough
    s t d m ll re ve
    """.split()
)
_CONTRACTED = frozenset({"s", "re", "ve", "ll", "d", "m"})
_ALONE = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # kana and Chinese characters
_COMMON = 0.05  # of the prompts


def distinct(texts: list[str], n: int) -> float:
    """Distinct runs of n words over all of them in a set of texts (Li et al. 2016, arXiv 1510.03055); 0 if none.

    More text repeats more, so only sets of like size compare.
    """
    runs = list(chain.from_iterable(_runs(text, n) for text in texts))
    return len(set(runs)) / len(runs) if runs else 0.0


def distinct_without(texts: list[str], n: int, prompts: Sequence[Hashable] | None = None) -> list[float]:
    """For each text, `distinct` of all the others; with their `prompts`, for each of those, of all texts of others."""
    grouped: dict[Hashable, Counter] = {}
    for prompt, text in zip(prompts if prompts is not None else range(len(texts)), texts, strict=True):
        grouped.setdefault(prompt, Counter()).update(_runs(text, n))
    runs = list(grouped.values())
    total = Counter(run for counts in runs for run in counts.elements())
    size = total.total()
    values = []
    for counts in runs:
        left = size - counts.total()
        own = sum(total[run] == count for run, count in counts.items())  # runs of no other text
        values.append((len(total) - own) / left if left else 0.0)
    return values


def _runs(text: str, n: int) -> list[tuple[str, ...]]:
    words = text.split()
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def empty(texts: list[str]) -> float:
    """The fraction of texts without a visible character; 0 if there are no texts."""
    return sum(not text.strip() for text in texts) / len(texts) if texts else 0.0


def top_word(prompts: list[str], completions: list[str]) -> tuple[str | None, list[bool]]:
    """The content word that the most completions hold, and which ones do; of equals the first in the alphabet.

    A content word is not an English function word, not in the completion's own prompt, and not in many prompts (two at
    least, and more than a twentieth of them). None where no completion has one.
    """
    of_prompts = [set(words(prompt)) for prompt in prompts]
    common = _common(of_prompts)
    held = [
        {word for word in set(words(text)) - own - common if not is_function_word(word)}
        for own, text in zip(of_prompts, completions, strict=True)
    ]
    counts = Counter(chain.from_iterable(held))
    word = min(counts, key=lambda word: (-counts[word], word), default=None)
    return word, [word in own for own in held]


def _common(of_prompts: list[set[str]]) -> set[str]:
    """What many different prompts share: their grammar, in any language, and their subject."""
    different = {frozenset(own) for own in of_prompts}
    counts = Counter(chain.from_iterable(different))
    return {word for word, count in counts.items() if count > max(1, _COMMON * len(different))}


def words(text: str) -> list[str]:
    """The words of a text in order, without a possessive 's: "It's the film's" gives it's, the, film."""
    text = unicodedata.normalize("NFC", text).lower().replace("\u2019", "'")
    # Marks belong to letters: vowels of Indian scripts are marks.
    kept = "".join(c if c == "'" or unicodedata.category(c)[0] in "LM" else " " for c in text)
    found = re.sub(f"([{_ALONE}])", r" \1 ", kept).split()
    plain = (word.strip("'") for word in found if any(map(str.isalpha, word)))  # a mark alone is of an emoji
    return [word if is_function_word(word) else word.removesuffix("'s") for word in plain]


def is_function_word(word: str) -> bool:
    """Whether a word is one of English grammar, alone or with another: the, it's, they'll, doesn't, n't."""
    stem, apostrophe, end = word.partition("'")
    contracted = bool(apostrophe) and end in _CONTRACTED and stem in FUNCTION_WORDS
    return word in FUNCTION_WORDS or contracted or word.endswith("n't")
