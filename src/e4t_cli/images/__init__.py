"""Decoding, framing and preparing photos; results and their PNG metadata."""
