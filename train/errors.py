"""The errors a user can cause or meet, each with the exit code the command line returns for it.

A message is one sentence that names the file, row, flag or tensor, followed by the cure.
"""

INTERRUPTED = 130  # exit code of Ctrl-C, as shells have it
READER_GONE = 141  # and of a program whose output nobody reads any more

# what reading a document raises that is damaged, or holds something else than it should
FOREIGN = (
    ArithmeticError,
    AttributeError,
    LookupError,
    OSError,
    RecursionError,
    TypeError,
    ValueError,
)


class LapisError(Exception):
    """Base of every error that ends a command with a sentence instead of a traceback."""

    exit_code = 1


class UsageError(LapisError):
    """A flag, or a combination of flags, that cannot work."""

    exit_code = 2


class DataError(LapisError):
    """Photos, labels or folders that cannot be trained on."""

    exit_code = 3


class CheckpointError(LapisError):
    """A checkpoint that is missing, damaged or of another model."""

    exit_code = 4


class NumericError(LapisError):
    """A loss or gradient that is not finite."""

    exit_code = 5


class OutOfMemoryError(LapisError):
    """The device has too little memory for this batch."""

    exit_code = 6


class DiskError(LapisError):
    """A file or folder that cannot be written."""

    exit_code = 7


class LockedError(LapisError):
    """A run folder in which another process trains."""

    exit_code = 8


class Stopped(Exception):
    """A signal has stopped a training, whose state is saved: no error. interrupted: by SIGINT."""

    def __init__(self, interrupted: bool):
        super().__init__("interrupted" if interrupted else "stopped")
        self.exit_code = INTERRUPTED if interrupted else 75
