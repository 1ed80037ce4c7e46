"""The errors a person can meet while training, each with the exit code its command ends with."""

from __future__ import annotations


class TrainingError(Exception):
    """Anything that ends a training command with a message instead of a stack trace.

    TrainingError                 1
    +-- DatasetError              1   the data is missing, damaged or unusable
    +-- RunError                  1   a run folder is missing, in use or not what was expected
    +-- MemoryTooSmallError       1   the data and the network do not fit into memory
    +-- ExportError               1   the exported model does not answer as the trained one
    +-- DivergedError             3   the loss became NaN or infinite
    +-- StorageFullError          4   no space left where the run is written

    A wrong command line ends with 2, as is usual, and Ctrl-C with 130.
    """

    exit_code = 1


class DatasetError(TrainingError):
    """The data is missing, damaged or unusable; the message names the file or class."""


class RunError(TrainingError):
    """A run folder is missing, in use, or not what was expected."""


class MemoryTooSmallError(TrainingError):
    """The data and the network do not fit into memory."""


class ExportError(TrainingError):
    """The exported model does not answer as the trained one did, so nothing was published."""


class DivergedError(TrainingError):
    """The loss became NaN or infinite."""

    exit_code = 3


class StorageFullError(TrainingError):
    """No space is left where the run is written."""

    exit_code = 4
