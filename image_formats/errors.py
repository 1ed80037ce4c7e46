"""Errors of image decoding."""


class UnreadableImage(Exception):  # noqa: N818 - named for the condition
    """The format is not supported, or the file is damaged or truncated. The message states the reason."""
