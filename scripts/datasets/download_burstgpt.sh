#!/usr/bin/env bash
# BurstGPT, arrival times and lengths of requests, to data/burstgpt/; LIMIT=N keeps N rows. Arguments go to dsakv fetch-data burstgpt.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

dsakv=.venv/bin/dsakv
if [[ ! -x $dsakv ]]; then
    dsakv=$(command -v dsakv) || {
        echo "error: dsakv is not installed" >&2
        echo "hint: make demo sets it up in .venv, or: pip install -c constraints.txt -e ." >&2
        exit 1
    }
fi
exec "$dsakv" fetch-data burstgpt "$@"
