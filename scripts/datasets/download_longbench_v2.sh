#!/usr/bin/env bash
# LongBench v2 to data/longbenchv2/; LIMIT=N keeps N rows. Arguments go to dsakv fetch-data longbenchv2.
set -euo pipefail
exec "$(dirname "${BASH_SOURCE[0]}")/../dsakv.sh" fetch-data longbenchv2 "$@"
