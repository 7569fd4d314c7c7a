"""Measures speed and memory of tuning and sampling against baselines: `make bench`."""
