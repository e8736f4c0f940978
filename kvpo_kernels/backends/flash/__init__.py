"""Launchers of the flash-attn package, where it is installed."""
