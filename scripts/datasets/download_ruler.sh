#!/usr/bin/env bash
# RULER's prompts to data/ruler/; LIMIT=N keeps N rows. Arguments go to dsakv fetch-data ruler.
set -euo pipefail
exec "$(dirname "${BASH_SOURCE[0]}")/../dsakv.sh" fetch-data ruler "$@"
