"""Kernels for KVPO-style reinforcement learning of streaming autoregressive video generators."""

from kvpo_kernels.errors import BackendUnavailable as BackendUnavailable
from kvpo_kernels.errors import KvpoError as KvpoError
