"""Inference-time tuning (section 3.4): the loss, one step, optimisers, memory, CUDA graphs."""
