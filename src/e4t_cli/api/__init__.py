"""The library behind the command line: names and paths in, results out. Nothing here prints."""
