"""Formats of files that hold examples, one a file, and the endings that tell them."""
