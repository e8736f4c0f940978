"""Kernels in Gluon, Triton's lower-level language, for one architecture each."""
