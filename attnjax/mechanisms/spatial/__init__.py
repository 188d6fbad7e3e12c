"""Spatial attention: tokens on maps of two or three axes."""
