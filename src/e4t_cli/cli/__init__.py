"""The command line: options in, one call of the library, paths out."""
