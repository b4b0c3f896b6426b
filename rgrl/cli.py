"""The command line: `rgrl COMMAND ...`, `python -m rgrl COMMAND ...` and recipes/*.py all come here.

Exit codes. 0: done. 2: bad input, said in one line. 75: stopped on request, all saved, to be resumed. 130: the
same by Ctrl-C. 1: anything else.
`torchrun` and `accelerate launch` turn every code but 0 into 1.

Nothing heavy is imported before a command needs it: help, the schema and bad settings are answered at once.
"""

import argparse
import difflib
import inspect
import json
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import rgrl
from rgrl.console import complain, drained, say, steady, tell, warn, writes_unicode
from rgrl.environment import check_numbers, read_by_libraries
from rgrl.errors import INTERRUPTED, REQUEUE, ConfigError, RunStoppedError

if TYPE_CHECKING:
    from rgrl.config import Config

WITH_SETTINGS = "--config FILE [--section.key VALUE ...]"
MORE = """\
`rgrl COMMAND --help` says more; after train, sample or evaluate it lists every setting. To choose devices or start
several processes: accelerate launch --config_file FILE -m rgrl train --config FILE ..."""


def main(words: list[str] | None = None) -> None:
    """Run the command that the words (those of the command line by default) name. Exits with a code unless it is 0."""
    name, *rest = (sys.argv[1:] if words is None else words) or [""]
    with ctrl_c_ends(), steady("stderr"), drained(), exit_codes():
        if name in ("-h", "--help"):
            say(usage())
        elif name == "--version":
            say(f"rgrl {rgrl.__version__}")
        elif name in COMMANDS:
            COMMANDS[name][1](rest)
        elif name:
            near = difflib.get_close_matches(name, COMMANDS, n=1)
            did_you_mean = f"; did you mean `{near[0]}`?" if near else f"; there are {', '.join(COMMANDS)}"
            raise ConfigError(f"unknown command {name!r}{did_you_mean}")
        else:
            complain(usage())
            sys.exit(2)


def usage() -> str:
    """All commands, a line each."""
    listed = "\n".join(
        f"{f'  rgrl {name} {arguments}'.rstrip()}\n      {summary(command)}"
        for name, (arguments, command) in COMMANDS.items()
    )
    return f"rgrl {rgrl.__version__}: post-train masked diffusion language models with rewards\n\n{listed}\n\n{MORE}"


def summary(command: Callable[[list[str]], None]) -> str:
    """What a command does: the first line of its docstring."""
    return (inspect.getdoc(command) or "").partition("\n")[0].removesuffix(".")


# ---------------------------------------------------------------------------------------------------- commands
def train(words: list[str]) -> None:
    """Train, or resume, the run that the settings describe.

    It ends with a table, samples and a plot. To resume: --run.resume_from_checkpoint latest, or a folder.
    """

    def command(config: "Config") -> None:
        from rgrl.runtime.launch import is_main_process
        from rgrl.tracking import report
        from rgrl.trainer import train

        output = train(config)
        if is_main_process():
            try:
                tell("\n" + report.at_the_end(output))
            except Exception as error:  # whatever it is: the run itself is done and saved
                warn(f"the report cannot be made: {type(error).__name__}: {error}; try `rgrl report {output}`")

    with_settings(train, command, words)


def sample(words: list[str]) -> None:
    """Print completions of the eval prompts with their rewards, as JSON lines.

    They are guided as `guidance` says (`guided` tells which are), at `eval.temperature`, the best of each group first.
    With --run.resume_from_checkpoint latest (or a folder) the trained adapter writes them, otherwise that of
    `lora.path`, or without one the base model.
    """

    def command(config: "Config") -> None:
        from rgrl.trainer import sample

        for row in sample(config):
            say(json.dumps(row, ensure_ascii=not writes_unicode()))

    with_settings(sample, command, words)


def evaluate(words: list[str]) -> None:
    """Print the metrics of unguided completions of the eval prompts, as JSON, and on stderr how sure the means are.

    They are of the adapter that --run.resume_from_checkpoint names (latest, or a folder), otherwise of the one in
    `lora.path`, or without one of the base model.
    """

    def command(config: "Config") -> None:
        from rgrl.runtime.launch import is_main_process
        from rgrl.trainer import evaluate

        result = evaluate(config)
        if is_main_process():
            say(json.dumps(result.metrics, indent=2))

    with_settings(evaluate, command, words)


def data(words: list[str]) -> None:
    """Print what a run would make of its data, as policy and reward models would see it, without loading weights.

    Counts of rows, of what is left out or cut, lengths in tokens, how the guide is shown the policy's vocabulary, and
    the first prompts (--first N, 3 by default) with their templates and numbers of tokens.
    """
    words, first = list(words), "3"
    if "--first" in words:
        at = words.index("--first")
        first, words[at : at + 2] = (words[at + 1] if at + 1 < len(words) else ""), []
    try:
        number = at_least(0)(first)
    except argparse.ArgumentTypeError as error:
        raise ConfigError(f"--first {error}") from error

    def command(config: "Config") -> None:
        from rgrl.config import located
        from rgrl.data.preview import preview

        if (processes := os.environ.get("WORLD_SIZE", "1")) != "1":
            raise ConfigError(f"data are shown in one process, and {processes} were started")
        for text in preview(located(config), number):
            say(text)

    with_settings(data, command, words)


def report(words: list[str]) -> None:
    """Show table, samples and plot of a run, finished or not.

    Nothing of the run is changed but its reward.png, so one that is still going can be looked at too.
    """
    parser = parser_of(report)
    parser.add_argument("run", metavar="RUN", type=a_path, help="its output folder (`run.output_dir`)")
    parser.add_argument("--output", metavar="FILE.png", type=a_path, help="the plot's file, instead of RUN/reward.png")
    given = parser.parse_args(words)
    from rgrl.tracking.report import as_text, check, plot, state

    path = given.output if given.output is not None else given.run / "reward.png"
    if path.suffix != ".png":
        raise ConfigError(f"--output {path}: expected a name that ends with .png")
    check(given.run)
    try:
        with read_by_libraries():
            plotted = plot(given.run, path)
    except FileExistsError as error:
        if given.output is not None:
            raise ConfigError(f"--output {error}") from error
        warn(f"the plot is not drawn: {error}, or name another with --output")
        plotted = None
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}): name a file with --output") from error
    say(f"{state(given.run)}\n\n{as_text(given.run, plotted)}")


def judge(words: list[str]) -> None:
    """Score a run's saved completions with another judge, and print a table by step.

    Beside the run's own reward, its parts, and its judge it shows the mean of this one over the held-out prompts, with
    its 95 % interval, and its change since the first evaluation, prompt by prompt. The run need not have ended; nothing
    of it is changed.
    """
    parser = parser_of(judge)
    parser.add_argument("run", metavar="RUN", type=a_path, help="its output folder (`run.output_dir`)")
    parser.add_argument("--judge", metavar="PATH", type=a_name, required=True, help="folder or Hub id, as `judge.path`")
    parser.add_argument(
        "--adapter", metavar="FOLDER", type=a_name, help="LoRA adapter of that model, merged when it is loaded"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="type of its weights")
    parser.add_argument("--max-length", metavar="N", type=at_least(0), default=0, help="as `judge.max_length`")
    parser.add_argument("--batch", metavar="N", type=at_least(1), default=16, help="completions scored at a time (16)")
    parser.add_argument("--output", metavar="FILE.csv", type=a_path, help="write the table here too, into a new file")
    given = parser.parse_args(words)
    if (processes := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise ConfigError(f"judging runs in one process, and {processes} were started")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as for a run
    with read_by_libraries():
        quiet_libraries()
        from rgrl.evaluation import rejudge
    if given.output is not None:
        rejudge.check_output(given.output)
    tables = rejudge.read_tables(given.run)
    model = rejudge.load(given.judge, given.adapter, given.dtype, given.max_length)
    model.template.make_room(rejudge.completion_length(given.run))
    tables = rejudge.with_bar(tables, model, given.batch)
    lines = rejudge.summary(tables)
    if given.output is not None:
        rejudge.write_csv(given.output, lines)
    say(f"{given.run}: mean ± half of the 95 % interval over prompts; this judge: {given.judge}\n")
    say(rejudge.as_text(lines))
    if truncated := sum(table.truncated for table in tables):
        say(f"\n{truncated} texts were too long for this judge, and lost the beginning of their prompt")


def export(words: list[str]) -> None:
    """Write a run's adapter, or the whole model with it merged in, as a folder to load and to publish.

    The adapter has the names of the base's own checkpoint, so `peft` loads it on the class of the base's authors. With
    --merge it is added to copies of the base's weight files, and config, tokenizer and code are copied as they are.
    Either comes with a model card, README.md. A folder that is not empty is never written to.
    """
    parser = parser_of(export)
    parser.add_argument("run", metavar="RUN", type=a_path, help="a run's output folder, or a checkpoint's folder")
    parser.add_argument("--merge", action="store_true", help="the whole model, with the adapter merged in")
    parser.add_argument(
        "--checkpoint", metavar="WHICH", type=a_name, default="latest", help="`latest` (default), a step or a folder"
    )
    parser.add_argument("--output", metavar="FOLDER", type=a_path, help="where to, instead of RUN/export/step_N")
    parser.add_argument(
        "--model", metavar="PATH", type=a_name, help="where the base is, if it is not at the run's `model.path` now"
    )
    given = parser.parse_args(words)
    quiet_libraries()
    from rgrl.export import export as write

    folder = write(given.run, given.merge, given.checkpoint, given.output, given.model)
    say(f"{'model' if given.merge else 'adapter'}: {folder}\nto publish it: hf upload my-org/name {folder}")


def schema(words: list[str]) -> None:
    """Write the JSON Schema of the settings, for editors and other programs."""
    parser = parser_of(schema)
    parser.add_argument("--output", metavar="FILE", type=a_path, help="write it here instead of printing it")
    given = parser.parse_args(words)
    from rgrl.config.describe import json_schema

    text = json.dumps(json_schema(), indent=2)
    if given.output is None:
        say(text)
        return
    try:
        given.output.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--output {given.output} cannot be written: {error.strerror}") from error


def presets(words: list[str]) -> None:
    """List the presets: data sets and tasks that a file of settings can name in `extends`, or print one.

    A file that says `extends: gsm8k` has that preset's settings where it says nothing else; of a list, such as
    `extends: [gsm8k, mine.yaml]`, later ones win.
    """
    parser = parser_of(presets)
    parser.add_argument("name", metavar="NAME", nargs="?", help="print this one's settings")
    given = parser.parse_args(words)
    from rgrl.config.presets import about, find, names

    if given.name is not None:
        say(find(given.name).read_text(encoding="utf-8").rstrip())
        return
    width = max(map(len, names()))
    say("\n".join(f"{name:<{width}}  {about(name)}" for name in names()))


def doctor(words: list[str]) -> None:
    """Show versions, devices and disks, and train a tiny model for a few seconds.

    The self-test writes, trains, saves and resumes in a temporary folder. Exit code 1 if it fails.
    """
    parser_of(doctor).parse_args(words)
    if (processes := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise ConfigError(f"the self-test runs in one process, and {processes} were started")
    quiet_libraries()
    from rgrl.doctor import facts, self_test

    for fact in facts():
        say(fact)
    problem, seconds = self_test()
    say(f"self-test: {'passed' if problem is None else 'failed'} in {seconds:.1f} s{f': {problem}' if problem else ''}")
    if problem is not None:
        sys.exit(1)


COMMANDS: dict[str, tuple[str, Callable[[list[str]], None]]] = {
    "train": (WITH_SETTINGS, train),
    "sample": (WITH_SETTINGS, sample),
    "evaluate": (WITH_SETTINGS, evaluate),
    "data": (f"{WITH_SETTINGS} [--first N]", data),
    "report": ("RUN [--output FILE.png]", report),
    "judge": ("RUN --judge PATH [--output FILE.csv]", judge),
    "export": ("RUN [--merge] [--checkpoint WHICH] [--output FOLDER] [--model PATH]", export),
    "presets": ("[NAME]", presets),
    "schema": ("[--output FILE]", schema),
    "doctor": ("", doctor),
}


# ---------------------------------------------------------------------------------------------------- settings
def with_settings(does: Callable[[list[str]], None], call: Callable[["Config"], object], words: list[str]) -> None:
    """Call `call` with the settings that the words name, or print the help of the command `does`."""
    given = split(words)
    if given is not None:
        run(call, *given)
        return
    from rgrl.config.describe import settings_help

    say(f"usage: rgrl {does.__name__} {WITH_SETTINGS}\n\n{inspect.getdoc(does)}\n\n{settings_help()}")


def split(words: list[str]) -> tuple[str, list[str]] | None:
    """The file after --config, and all other words as they are; None where they ask for help. Raises `ConfigError`."""
    path, overrides, queue = None, [], list(words)
    while queue:
        word = queue.pop(0)
        if word in ("-h", "--help"):
            return None
        if word.startswith("--config="):
            path = word.removeprefix("--config=")
        elif word == "--config":
            if not queue or queue[0].startswith("--"):
                raise ConfigError("--config needs a file")
            path = queue.pop(0)
        else:
            overrides.append(word)
            if word.startswith("--") and "=" not in word and queue and not queue[0].startswith("--"):
                overrides.append(queue.pop(0))  # its value, which may look like an option: -1e-4, -h
    if path is None:
        raise ConfigError("--config FILE is missing: name a YAML file with the settings")
    return path, overrides


def run(call: Callable[["Config"], object], path: str, overrides: list[str]) -> None:
    """Call `call` with the settings in the file at `path` under the overrides; its errors become exit codes."""
    from rgrl.config import load_config

    with exit_codes():
        check_numbers(os.environ)
        config = load_config(path, overrides)
    # Threads that spin while they wait for each other make a step take 20 times as long where anything else is running.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is loaded
    with exit_codes(), read_by_libraries():
        from torch.distributed.elastic.multiprocessing.errors import record

        quiet_libraries()
        working_folder_last()

    @record  # so that a launcher shows the traceback of the rank that failed first
    def go() -> None:
        with exit_codes():
            call(config)

    go()


def working_folder_last() -> None:
    """Let a user's own rewards be found beside the run, where nothing hides a library; `python -m` puts it first."""
    try:
        here = os.getcwd()
    except OSError as error:
        raise ConfigError(f"the working folder cannot be entered: {error.strerror}") from error
    sys.path[:] = [path for path in sys.path if path not in ("", here)] + [here]


def quiet_libraries() -> None:
    """Turn off what libraries say about things that are decided here."""
    import transformers

    transformers.utils.logging.disable_progress_bar()  # the run has a bar of its own
    transformers.utils.logging.set_verbosity_error()  # loading makes sure of what it warns of
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)


# ------------------------------------------------------------------------------------------ errors and arguments
@contextmanager
def ctrl_c_ends() -> Iterator[None]:
    """Let Ctrl-C end the body as it ends other programs, at once and without a traceback."""
    usual = threading.current_thread() is threading.main_thread() and (
        signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if usual:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        if usual:
            signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def exit_codes() -> Iterator[None]:
    """Turn errors that a user can act on into one line and an exit code."""
    try:
        yield
    except ConfigError as error:
        # One line a machine: the error may be one machine's.
        if error.on_one_rank or os.environ.get("LOCAL_RANK", "0") == "0":
            complain(f"error: {' '.join(str(error).split())}")
        sys.exit(2)
    except RunStoppedError as stopped:
        if stopped.on_one_rank or os.environ.get("RANK", "0") == "0":
            asked = stopped.code in (REQUEUE, INTERRUPTED)  # that is no error, and says itself what it is
            complain(f"{'' if asked else 'error: '}{' '.join(str(stopped).split())}")
        sys.exit(stopped.code)


class Parser(argparse.ArgumentParser):
    """Arguments whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog}: {message}")


def at_least(least: int) -> Callable[[str], int]:
    """A type of arguments: whole numbers from `least` on."""

    def number(text: str) -> int:
        if not (text.isascii() and text.isdecimal() and len(text) < 10 and int(text) >= least):
            raise argparse.ArgumentTypeError(f"must be a whole number from {least}, not {text[:60]!r}")
        return int(text)

    return number


def a_path(text: str) -> Path:
    """A type of arguments: paths, with `~` and variables written out."""
    return Path(a_name(text))


def a_name(text: str) -> str:
    """The same as text: it may also be the id of something on the Hub."""
    from rgrl.config import expanded

    try:
        return expanded(text, "the path")
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def parser_of(command: Callable[[list[str]], None]) -> Parser:
    """A parser that introduces itself by the command's docstring."""
    return Parser(
        prog=f"rgrl {command.__name__}",
        description=inspect.getdoc(command),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
