"""Image files: what their headers declare, and their pixels as Pillow decodes them. Imports no TensorFlow.

Shared by the training, the service and the client, so that a file means the same image to each of them. The exported
model decodes the same files with TensorFlow (`training/exporter/image_decoding.py`).
"""

__version__ = "0.1.0"  # of the whole project: pyproject.toml and the other packages read it here
