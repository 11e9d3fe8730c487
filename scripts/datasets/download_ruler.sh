#!/usr/bin/env bash
# RULER's prompts to data/ruler/; LIMIT=N keeps N rows. Arguments go to dsakv fetch-data ruler.
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
exec "$dsakv" fetch-data ruler "$@"
