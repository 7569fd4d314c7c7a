"""Measures Stable Diffusion's size on a GPU in nine minutes, the most important first: `python -m benchmarks.gpu`."""
