"""Sources of training images: folders, tar shards, tables, Python iterables."""
