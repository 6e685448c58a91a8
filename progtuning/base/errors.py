"""The kinds of failure the program speaks of; `cli/command.py` turns each into one line and an exit status."""


class InputError(ValueError):
    """What was given is wrong: a command, an option, a file. Exit status 2.

    The message is one line that names the option, or the file and its line, what was got and what was expected.
    """


class RunError(RuntimeError):
    """What was asked for is right, but the run failed: network, disk, a loss that is not finite. Exit status 1."""


class NotFinite(RunError):
    """A loss, a gradient or an output is not finite, which the same run would come to again."""


class Interrupted(KeyboardInterrupt):
    """A signal asked the run to stop. Exit status 128 and the signal's number: 130 for SIGINT, 143 for SIGTERM."""

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.signal = signal

    def __reduce__(self):
        return type(self), (*self.args, self.signal)  # from one process to another
