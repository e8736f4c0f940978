"""Portable kernels in `triton.language`: NVIDIA from Ampere on, AMD, and Triton's interpreter."""
