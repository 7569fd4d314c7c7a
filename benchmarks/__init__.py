"""Speed and memory, arm against arm, in one process: `make bench`."""
