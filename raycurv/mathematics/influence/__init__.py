"""Inverse-Hessian-vector products of queries, and the scores of training examples on them."""
