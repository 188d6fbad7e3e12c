"""Linear attention: a state of fixed size instead of a growing cache."""
