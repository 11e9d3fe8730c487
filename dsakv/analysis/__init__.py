"""Traces into placement figures. Nothing here needs torch."""
