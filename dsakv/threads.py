"""How the threads of numeric libraries wait for each other."""

from __future__ import annotations

from collections.abc import MutableMapping


def wait_briefly(environ: MutableMapping[str, str]) -> None:
    """Make OpenMP threads spin only briefly before they sleep; to be called before PyTorch is imported.

    GNU OpenMP's default is to spin for milliseconds. On a machine with other busy processes a small model then runs
    up to fifty times slower: the threads that spin keep those that work from the cores. What the user has set stays.
    """
    if "OMP_WAIT_POLICY" not in environ:
        environ.setdefault("GOMP_SPINCOUNT", "2000")
