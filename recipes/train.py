"""Train: accelerate launch recipes/train.py --config recipes/NAME/FILE.yaml [--section.key value ...]"""

from rgrl.cli import run
from rgrl.config import Config
from rgrl.runtime.launch import is_main_process
from rgrl.tracking import report
from rgrl.trainer import train


def main(config: Config) -> None:
    output = train(config)
    if is_main_process():
        print("\n" + report.summary(output))
        print("\n" + report.before_and_after(output))
        print(f"\nplot: {report.plot(output)}\nadapter: {output / 'checkpoints'}")


if __name__ == "__main__":
    run(main, __doc__)
