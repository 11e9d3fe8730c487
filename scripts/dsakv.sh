#!/usr/bin/env bash
# dsakv from the checkout's .venv, else from the path, run in the checkout. The other scripts go through it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

dsakv=.venv/bin/dsakv
if [[ ! -x $dsakv ]]; then
    dsakv=$(command -v dsakv) || {
        echo "error: dsakv is not installed" >&2
        echo "hint: make demo sets it up in .venv, or: pip install -c constraints.txt -e ." >&2
        exit 1
    }
fi
exec "$dsakv" "$@"
