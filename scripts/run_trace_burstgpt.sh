#!/usr/bin/env bash
# Trace BurstGPT; CKPT_PATH, CONFIG, LIMIT, BURSTGPT_CSV and DS_TRACE_* count. Arguments go to dsakv trace burstgpt.
set -euo pipefail
exec "$(dirname "${BASH_SOURCE[0]}")/dsakv.sh" trace burstgpt "$@"
