"""Exact products of the curvature with vectors, and what is computed from nothing but these."""
