#!/usr/bin/env bash
# The four workloads one after the other, with the variables of run_trace_*.sh. Arguments go to every one of them.
# A workload that fails does not stop the others; the exit code says whether any did.
set -euo pipefail

failed=()
for workload in ruler longbenchv2 sharegpt burstgpt; do
    echo "== $workload" >&2
    "$(dirname "${BASH_SOURCE[0]}")/run_trace_$workload.sh" "$@" || failed+=("$workload")
done
if ((${#failed[@]})); then
    echo "failed: ${failed[*]}" >&2
    exit 1
fi
