#!/usr/bin/env bash
# BurstGPT's log to data/burstgpt/; LIMIT=N keeps N rows. Arguments go to dsakv fetch-data burstgpt.
set -euo pipefail
exec "$(dirname "${BASH_SOURCE[0]}")/../dsakv.sh" fetch-data burstgpt "$@"
