"""Headers of encoded images, one module per format, read without decoding anything."""
