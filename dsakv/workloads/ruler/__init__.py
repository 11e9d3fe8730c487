"""RULER: needle, tracking and aggregation tasks of any length."""

from dsakv.workloads.ruler.workload import Ruler

__all__ = ["Ruler"]
