"""Primitives of attention with a body for each platform; `attnjax` is built on them."""
