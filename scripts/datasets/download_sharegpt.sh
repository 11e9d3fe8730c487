#!/usr/bin/env bash
# ShareGPT conversations to data/sharegpt/; LIMIT=N keeps N rows. Arguments go to dsakv fetch-data sharegpt.
set -euo pipefail
exec "$(dirname "${BASH_SOURCE[0]}")/../dsakv.sh" fetch-data sharegpt "$@"
