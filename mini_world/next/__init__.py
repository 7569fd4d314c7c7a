"""The next `mini`: 128-pixel drawings with more attributes, and the training of a base on them; not shipped yet."""
