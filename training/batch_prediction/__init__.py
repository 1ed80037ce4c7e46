"""Batch prediction: classifies all images of a source with an exported model, into one Parquet file."""
