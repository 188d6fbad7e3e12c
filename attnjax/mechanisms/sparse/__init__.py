"""Sparse attention: layouts that leave out most of the pairs."""
