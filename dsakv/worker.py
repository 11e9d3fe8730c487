"""A command from its resolved configuration: ``python -m dsakv.worker JOB CONFIG.json``.

``dsakv.launch`` starts each rank of a command like this, and ``bench --compare`` each of its rounds.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import msgspec

from dsakv.cli import INTERRUPTED, guarded, run_job, start_job
from dsakv.config import Config
from dsakv.errors import PeerLostError
from dsakv.launch import find_place
from dsakv.threads import wait_briefly


def main(job: str, config_path: str) -> int:
    """Run ``job``, as this process's rank where it is one of several; returns the exit code.

    Only rank 0 writes to the terminal.
    """
    config = msgspec.json.decode(Path(config_path).read_bytes(), type=Config)

    def call() -> int:
        if find_place(os.environ) is None:
            return start_job(job, config)
        try:
            run_job(job, config)
        except PeerLostError as error:  # who started the ranks tells of the one that died
            return error.exit_code
        except KeyboardInterrupt:  # and of an interruption
            raise SystemExit(INTERRUPTED) from None
        return 0

    return guarded(call)


if __name__ == "__main__":
    wait_briefly(os.environ)
    sys.exit(main(*sys.argv[1:]))
