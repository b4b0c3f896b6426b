"""Checks that may hang, in a process that imports nothing of rgrl. Run as a script; it reads jobs from its input.

The process itself only waits. It forks a child that does the jobs, and kills it where one takes too long; another fork
takes milliseconds, as what it needs is imported already. Each line is JSON: `id`, `kind`, `texts`, `seconds`; the
answer has the same `id` and a `value`: 1, 0, or null where the check was ended or failed.
"""

import json
import os
import re
import resource
import select
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

MEMORY = 4 * 2**30  # bytes of address space of a job
NO_MATH = (
    "the verifier `math` needs the package math-verify, which cannot be imported ({error}): "
    'pip install "rgrl[math]", or pip install -e ".[math]" in a clone'
)


def check_pattern(pattern: str, text: str, part: str, column: str, expected: str) -> float:
    """Whether a regular expression is found, and its first group is what it should be."""
    found = re.fullmatch(pattern, text) if part == "whole" else re.search(pattern, text)
    if found is None:
        return 0.0
    return float(not column or (found[1] or "").strip() == expected)


def prepare_math() -> None:
    """Import math-verify, and take away the one way in which sympy evaluates text as Python.

    `sympy.Number("12")`, which the parser of LaTeX calls for every number, ends in `eval` of a text made from it. Here
    it ends in `read_number`, which reads digits and refuses everything else.
    """
    import math_verify  # noqa: F401
    import sympy.physics.units  # noqa: F401  (imported by the first `simplify`, it evaluates names of its own)
    from sympy import Float, Integer
    from sympy.parsing import sympy_parser

    for pair in (("(x+1)^2", "x^2+2x+1"), ("1<x<2", "(1,2)"), ("\\sin x", "\\cos x"), ("\\frac{1}{2}", "0.5")):
        check_math(*pair)  # what sympy imports when it is needed, it imports now

    def read_number(text: str, *args: Any, **kwargs: Any) -> Any:
        digits = str(text).strip()
        if re.fullmatch(r"[-+]?[0-9]{1,1000}", digits):
            return Integer(int(digits))
        if re.fullmatch(r"[-+]?([0-9]{1,1000}\.[0-9]{0,1000}|\.[0-9]{1,1000})", digits):
            return Float(digits)
        raise ValueError("text is never evaluated")

    for name in ("eval_expr", "parse_expr"):
        setattr(sympy_parser, name, read_number)


def check_math(expected: str, answer: str) -> float:
    """Whether two expressions in LaTeX are equal, by math-verify, without its own time limits."""
    from math_verify import LatexExtractionConfig, parse, verify

    found = []
    for text in (expected, answer):
        config = [LatexExtractionConfig(boxed_match_priority=0)]
        found.append(parse(f"\\boxed{{{text}}}", extraction_config=config, parsing_timeout=None))
    if not found[0]:
        raise ValueError("the right answer cannot be read")
    return float(bool(found[1]) and verify(found[0], found[1], timeout_seconds=None))


CHECKS: dict[str, Callable[..., float]] = {"pattern": check_pattern, "math": check_math}


# ------------------------------------------------------------------------------------------------ the child
def work(source: int, answers: int) -> None:
    """Do jobs, one a line, until there are no more."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    except (ValueError, OSError):  # a lower limit holds already, or the system has none
        pass
    with os.fdopen(source, "rb") as jobs:
        for line in jobs:
            job = json.loads(line)
            # Where the parent is gone, nobody else would end a job that hangs.
            signal.setitimer(signal.ITIMER_REAL, job["seconds"] + 10.0)
            try:
                value = CHECKS[job["kind"]](*job["texts"])
            except Exception:  # whatever sympy and antlr raise of a text, or for want of memory
                value = None
            signal.setitimer(signal.ITIMER_REAL, 0)
            os.write(answers, json.dumps({"id": job["id"], "value": value}).encode() + b"\n")
    os._exit(0)


class Child:
    """A fork of this process that does jobs."""

    def __init__(self, keep: tuple[int, ...]) -> None:
        source, self.jobs = os.pipe()
        self.answers, answers = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            for descriptor in (self.jobs, self.answers, *keep):
                os.close(descriptor)
            try:
                work(source, answers)
            finally:
                os._exit(1)
        os.close(source)
        os.close(answers)

    def do(self, line: bytes, seconds: float) -> bytes | None:
        """Its answer to a job; None where there is none in time."""
        until, received = time.monotonic() + seconds, b""
        try:
            send(self.jobs, line)
        except OSError:
            return None
        while not received.endswith(b"\n"):
            left = until - time.monotonic()
            if left <= 0 or not select.select([self.answers], [], [], left)[0]:
                return None
            part = os.read(self.answers, 65536)
            if not part:
                return None
            received += part
        return received

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.jobs)
        os.close(self.answers)


def send(descriptor: int, content: bytes) -> None:
    while content:
        content = content[os.write(descriptor, content) :]


# ------------------------------------------------------------------------------------------------ the parent
def prepare(kind: str) -> str | None:
    """Import what a kind of job needs. Returns what is wrong."""
    try:
        if kind == "math":
            prepare_math()
    except ImportError as error:
        return NO_MATH.format(error=error)
    return None


def main() -> None:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    # Libraries print; what they print must not be taken for an answer.
    answers = os.dup(1)
    os.dup2(2, 1)
    child: Child | None = None
    for line in sys.stdin.buffer:
        job = json.loads(line)
        if job["kind"] == "prepare":
            if child is not None:
                child.kill()
                child = None
            problem = prepare(job["texts"][0])
            send(answers, json.dumps({"id": job["id"], **({"failed": problem} if problem else {})}).encode() + b"\n")
            continue
        if child is None:
            child = Child((0, answers))
        answer = child.do(line, job["seconds"])
        if answer is None:
            child.kill()
            child = None
            answer = json.dumps({"id": job["id"], "value": None}).encode() + b"\n"
        send(answers, answer)
    if child is not None:
        child.kill()


if __name__ == "__main__":
    main()
