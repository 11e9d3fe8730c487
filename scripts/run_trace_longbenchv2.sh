#!/usr/bin/env bash
# Trace LongBench v2; CKPT_PATH, CONFIG, LIMIT, HF_TOKEN and DS_TRACE_* count. Arguments go to dsakv trace longbenchv2.
set -euo pipefail
exec "$(dirname "${BASH_SOURCE[0]}")/dsakv.sh" trace longbenchv2 "$@"
