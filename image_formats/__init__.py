"""Reads the headers of image files, and decodes them with Pillow. Does not import TensorFlow.

Training, service and client share this package, so that a file gives the same pixels everywhere. The exported model
decodes the same files with TensorFlow (`training/exporter/image_decoding.py`).
"""

__version__ = "0.1.0"  # of the whole project: pyproject.toml and the other packages read it here
