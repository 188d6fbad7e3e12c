"""Attention joined with a memory: recurrences, learned stores, updates at test time."""
