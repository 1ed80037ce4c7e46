"""Reads the headers of image files, and decodes them with Pillow. Does not import TensorFlow.

Training, service and client share this package, so that a file gives the same pixels everywhere. The exported model
decodes the same files with TensorFlow (`training/image_decoding.py`).
"""
