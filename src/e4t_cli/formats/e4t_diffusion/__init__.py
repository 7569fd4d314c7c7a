"""Import of checkpoints of mkshing/e4t-diffusion, the public implementation of the paper."""
