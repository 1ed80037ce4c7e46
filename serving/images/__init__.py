"""Encoded images: limits, cost and decoding."""
