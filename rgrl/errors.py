"""How a run ends early: bad input, and stops. Commands turn both into one line and an exit code."""

REQUEUE = 75  # exit code of a run that stopped on request and can be resumed (EX_TEMPFAIL of sysexits.h)
INTERRUPTED = 130  # exit code of a run that Ctrl-C stopped, as shells have it; it can be resumed as well


class ConfigError(ValueError):
    """Bad input from the user. Commands print the message on one line and exit with code 2.

    `on_one_rank`: only this process met the error and has to print it; otherwise the main process prints it for all.
    """

    def __init__(self, message: str, on_one_rank: bool = False) -> None:
        super().__init__(message)
        self.on_one_rank = on_one_rank


class RunStoppedError(Exception):
    """A run that ends before its last step. Commands print the message on one line and exit with `code`.

    `on_one_rank`: as of `ConfigError`.
    """

    def __init__(self, message: str, code: int = 1, on_one_rank: bool = False) -> None:
        super().__init__(message)
        self.code = code
        self.on_one_rank = on_one_rank
