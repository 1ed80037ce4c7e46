"""Evaluation of a trained model: metrics, calibration, plots, report."""
