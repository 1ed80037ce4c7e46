"""Errors of training, with the exit code of the command."""

from __future__ import annotations


class TrainingError(Exception):
    """Base class: the command prints the message, without a traceback.

    TrainingError                 1
    +-- DatasetError              1   the data is missing, damaged or unusable
    +-- WeightsError              1   the weights of a backbone are missing, damaged or of another network
    +-- RunError                  1   a run directory is missing, in use or invalid
    +-- MemoryTooSmallError       1   the data and the network do not fit into memory
    +-- ClusterError              1   the workers of a distributed run cannot work together
    +-- ModelError                1   a model cannot be imported
    +-- ExportError               1   the exported model's outputs differ from the trained model's
    +-- PredictionError           1   a source cannot be read, its predictions cannot be written, or the model fails
    +-- DivergedError             3   the loss became NaN or infinite
    +-- StorageFullError          4   the disk is full
    +-- UnreadableImagesError     5   predictions are complete, but some images have an error instead

    Usage errors have exit code 2, Ctrl-C has 130.
    """

    exit_code = 1


class DatasetError(TrainingError):
    """The data is missing, damaged or unusable; the message names the file or class."""


class WeightsError(TrainingError):
    """The weights of a backbone are missing, damaged or of another network; the message says which file is expected."""


class RunError(TrainingError):
    """A run directory is missing, in use, or invalid."""


class MemoryTooSmallError(TrainingError):
    """The data and the network do not fit into memory."""


class ClusterError(TrainingError):
    """The workers of a distributed run cannot work together: invalid TF_CONFIG, different settings, a lost worker."""


class ModelError(TrainingError):
    """A model cannot be imported; the message says what was found and how to fix it."""


class ExportError(TrainingError):
    """The exported model's outputs differ from the trained model's, or it cannot be written; nothing is published."""


class PredictionError(TrainingError):
    """A source of images cannot be read, predictions cannot be written, or the model fails."""


class DivergedError(TrainingError):
    """The loss became NaN or infinite."""

    exit_code = 3


class StorageFullError(TrainingError):
    """The disk is full."""

    exit_code = 4


class UnreadableImagesError(TrainingError):
    """The predictions are complete, but some images could not be read: their rows have the reason."""

    exit_code = 5
