"""Draws the training images of `mini` and trains its weights: `python -m mini_world --help`.

This package uses the library; the library never imports it.
"""
