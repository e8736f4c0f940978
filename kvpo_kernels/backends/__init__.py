"""Implementations of the ops; each is imported on first use."""
