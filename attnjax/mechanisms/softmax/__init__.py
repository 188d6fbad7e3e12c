"""Softmax attention: exact, whatever the order in which its keys are visited."""
