"""Tensor kernels; pure torch is the specification."""
