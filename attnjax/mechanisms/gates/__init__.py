"""Heads and experts chosen or weighted by a gate, token by token."""
