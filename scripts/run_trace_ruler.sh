#!/usr/bin/env bash
# Trace RULER; CKPT_PATH, CONFIG, LIMIT and DS_TRACE_* count. Arguments go to dsakv trace ruler.
set -euo pipefail
exec "$(dirname "${BASH_SOURCE[0]}")/dsakv.sh" trace ruler "$@"
