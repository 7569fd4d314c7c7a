"""Sources of training images, and their preparation."""
