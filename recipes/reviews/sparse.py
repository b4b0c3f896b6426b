"""A sparse reward by rule, for `sparse.yaml`: 1 for a completion that is clearly praise and reads like text, else 0."""

import re

PRAISE = frozenset(
    "amazing astonishing beautiful beautifully best bravura breathtaking brilliant brilliantly captivating charming "
    "compelling dazzling delightful delightfully enchanting engrossing enjoyable entertaining excellent exceptional "
    "exhilarating extraordinary fantastic fascinating finest flawless funniest gorgeous great gripping heartfelt "
    "hilarious hilariously inspiring intelligent irresistible joyous magnificent marvelous masterful masterpiece "
    "memorable mesmerizing moving outstanding perfect perfectly powerful refreshing remarkable remarkably rewarding "
    "riveting satisfying sensational smart spectacular splendid stunning sublime superb superbly terrific thrilling "
    "touching triumph unforgettable wonderful wonderfully".split()
)
BLAME = frozenset(
    "amateurish annoying awful bad badly banal bland bored boring clichéd clichés clumsy confused confusing contrived "
    "depressing derivative disappointing disappointment dreary dull dumb embarrassing fail failed fails failure flat "
    "forced forgettable formulaic hollow hopeless inept insipid lack lacking lacks lame lazy lifeless mediocre mess "
    "messy mindless nothing overlong painful pathetic plodding pointless poor poorly predictable pretentious "
    "ridiculous sadly shallow silly sloppy slow stale stupid tedious terrible thin tired tiresome tiring ugly "
    "uneven uninspired unfortunately unfunny unoriginal waste wasted weak worse worst".split()
)
REPEATABLE = frozenset("a an and as at be by for from has his her in is it its of on or that the this to with".split())
LEAST = 8  # words


def praised(prompts: list[str], completions: list[str], rows: list[dict]) -> list[float]:
    """1 for at least two different words of PRAISE, none of BLAME, no content word twice and LEAST words, else 0."""
    return [float(passes(text)) for text in completions]


def passes(text: str) -> bool:
    words = re.findall(r"[a-zé]+(?:'[a-z]+)?", text.lower())
    content = [word for word in words if word not in REPEATABLE]
    return (
        len(words) >= LEAST
        and len(PRAISE.intersection(words)) >= 2
        and not BLAME.intersection(words)
        and len(set(content)) == len(content)
    )
