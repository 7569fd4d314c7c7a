"""The drawn world of `mini`, and the trainings that make its weights: `python -m mini_world --help`.

A user of the library, never imported by it.
"""
