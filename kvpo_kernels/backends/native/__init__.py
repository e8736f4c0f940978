"""Launchers of the C++ kernels in csrc/."""
