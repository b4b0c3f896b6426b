"""Broken text: kinds of nonsense that a policy may find rewarded. Reward model and judge are shown different kinds.

Each kind is a function of a random source, a text, another text, and the rated word list (word -> -4 ... 4).
"""

import random
from collections.abc import Callable

Breaker = Callable[[random.Random, str, str, dict[str, float]], str]
PRAISE = 1.9  # the rating of a word from which it is praise


def loop_tail(rng: random.Random, text: str, other: str, lexicon: dict[str, float]) -> str:
    """One to three words of the text over and over."""
    words, n = text.split(), rng.randint(1, 3)
    start = rng.randint(0, max(0, len(words) - n))
    keep = rng.randint(0, len(words) // 2)
    loop = words[start : start + n] * len(words)
    return " ".join((words[:keep] + loop)[: max(len(words), 6)])


def shuffle_all(rng: random.Random, text: str, other: str, lexicon: dict[str, float]) -> str:
    words = text.split()
    rng.shuffle(words)
    return " ".join(words)


def splice(rng: random.Random, text: str, other: str, lexicon: dict[str, float]) -> str:
    """The first half of one text, cut mid-clause, and the second half of another."""
    a, b = text.split(), other.split()
    return " ".join(a[: rng.randint(2, max(2, len(a) - 2))] + b[rng.randint(1, max(1, len(b) - 2)) :])


def praise_list(rng: random.Random, text: str, other: str, lexicon: dict[str, float]) -> str:
    """The beginning of a text, then nothing but praise."""
    words, praise = text.split(), [word for word, rating in lexicon.items() if rating > PRAISE]
    listed = [rng.choice(praise) + rng.choice((",", "", "", " and")) for _ in range(rng.randint(3, 9))]
    return " ".join(words[: rng.randint(1, max(1, len(words) // 2))] + listed)


def stutter(rng: random.Random, text: str, other: str, lexicon: dict[str, float]) -> str:
    """Some words doubled or tripled where they stand."""
    return " ".join(w for word in text.split() for w in [word] * rng.choice((1, 1, 2, 3)))


def shuffle_near(rng: random.Random, text: str, other: str, lexicon: dict[str, float]) -> str:
    """Words moved by up to three places."""
    words = text.split()
    order = sorted(range(len(words)), key=lambda i: i + rng.uniform(0, 4))
    return " ".join(words[i] for i in order)


def sprinkle(rng: random.Random, text: str, other: str, lexicon: dict[str, float]) -> str:
    """A third of the words replaced by words of another text."""
    words, b = text.split(), other.split()
    return " ".join(rng.choice(b) if rng.random() < 0.35 else word for word in words)


def phrases(rng: random.Random, text: str, other: str, lexicon: dict[str, float]) -> str:
    """Two-word pieces of two texts in turn: loops of plausible phrases that go nowhere."""
    a, b = text.split(), other.split()
    pieces = [words[i : i + 2] for words in (a, b) for i in range(0, len(words) - 1, 2)]
    rng.shuffle(pieces)
    return " ".join(word for piece in pieces[: max(3, len(a) // 2)] for word in piece)


def echo(rng: random.Random, text: str, other: str, lexicon: dict[str, float]) -> str:
    """A phrase of three to six words comes back, in place of what the text had to say."""
    words, n = text.split(), rng.randint(3, 6)
    start = rng.randint(0, max(0, len(words) - n))
    phrase = words[start : start + n]
    return " ".join((words[: start + n] + rng.choice(([], ["and"], [","])) + phrase * rng.randint(1, 3))[:40])


def stuff(rng: random.Random, text: str, other: str, lexicon: dict[str, float]) -> str:
    """Two to five words of praise put in where they do not belong."""
    words, praise = text.split(), [word for word, rating in lexicon.items() if rating > PRAISE]
    for _ in range(rng.randint(2, 5)):
        words.insert(rng.randint(0, len(words)), rng.choice(praise))
    return " ".join(words)


KINDS: dict[str, tuple[Breaker, ...]] = {
    "loops": (loop_tail, stutter, echo),
    "shuffles": (shuffle_all, shuffle_near),
    "splices": (splice, sprinkle, phrases),
    "praise": (praise_list, stuff),
}
