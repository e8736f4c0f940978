"""Launchers of the CUDA C++ kernels in `kvpo_kernels._cuda`."""
