"""What is raised for a file that holds no image that can be read."""


class UnreadableImage(Exception):  # noqa: N818 - it says what is wrong with the image
    """The file is of no supported format, damaged or cut off. The message says which."""
