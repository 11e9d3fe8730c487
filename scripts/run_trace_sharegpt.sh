#!/usr/bin/env bash
# Trace ShareGPT; CKPT_PATH, CONFIG, LIMIT, HF_TOKEN and DS_TRACE_* count. Arguments go to dsakv trace sharegpt.
set -euo pipefail
exec "$(dirname "${BASH_SOURCE[0]}")/dsakv.sh" trace sharegpt "$@"
