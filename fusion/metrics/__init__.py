"""Metrics, calibration and thresholds."""
