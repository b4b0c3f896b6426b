"""The third judge: a ridge regression on words and word pairs of the judge's half, without a network.

It knows nothing of broken text and shares nothing with the other two but its ratings, so it checks whether what pleases
them is praise at all.
"""

import json
import math
from collections import Counter
from itertools import pairwise
from pathlib import Path

TERMS = Path(__file__).parent / "ridge.json"
Fitted = dict  # {"intercept": number, "terms": {term: (inverse document frequency, coefficient)}}


def terms(text: str) -> Counter[str]:
    """Words and pairs of neighbouring words."""
    words = text.lower().split()
    return Counter(words + [f"{a} {b}" for a, b in pairwise(words)])


def fit(rated: list[tuple[str, float]]) -> Fitted:
    """Fit texts and their ratings, on the terms that at least two of them have. Needs scikit-learn."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import Ridge

    vectorizer = TfidfVectorizer(analyzer=lambda text: list(terms(text).elements()), sublinear_tf=True, min_df=2)
    model = Ridge(alpha=1.0).fit(vectorizer.fit_transform([t for t, _ in rated]), [rating for _, rating in rated])
    columns = zip(vectorizer.get_feature_names_out(), vectorizer.idf_.tolist(), model.coef_.tolist(), strict=True)
    kept = {name: (round(idf, 2), round(weight, 2)) for name, idf, weight in columns}
    return {"intercept": round(float(model.intercept_), 3), "terms": kept}


def score(text: str, fitted: Fitted) -> float:
    """The rating, -4 ... 4, that the text's words suggest: the coefficients of its terms, weighed.

    The weights are (1 + log count) x inverse document frequency, of unit length.
    """
    known = {term: count for term, count in terms(text).items() if term in fitted["terms"]}
    weights = {term: (1 + math.log(count)) * fitted["terms"][term][0] for term, count in known.items()}
    norm = math.sqrt(sum(weight * weight for weight in weights.values())) or 1.0
    return fitted["intercept"] + sum(weight * fitted["terms"][term][1] for term, weight in weights.items()) / norm


def load() -> Fitted:
    """The shipped one."""
    return json.loads(TERMS.read_text())
