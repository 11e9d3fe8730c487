"""Checkpoints into parameters."""
