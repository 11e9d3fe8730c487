"""One rank of a command, as ``dsakv.launch`` starts it: ``python -m dsakv.worker JOB CONFIG.json``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import msgspec

from dsakv.cli import INTERRUPTED, guarded, run_job
from dsakv.config import Config
from dsakv.errors import PeerLostError
from dsakv.threads import wait_briefly


def main(job: str, config_path: str) -> int:
    """Run ``job`` as this process's rank; returns the exit code. Only rank 0 writes to the terminal."""
    config = msgspec.json.decode(Path(config_path).read_bytes(), type=Config)

    def call() -> int:
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
