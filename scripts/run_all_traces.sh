#!/usr/bin/env bash
# The four workloads one after the other, with the variables of run_trace_*.sh. Arguments go to every one of them.
# A workload that fails does not stop the others; the exit code says whether any did. With DS_TRACE_OUT each gets a
# folder of its own there.
set -euo pipefail

failed=()
for workload in ruler longbenchv2 sharegpt burstgpt; do
    echo "== $workload" >&2
    out=${DS_TRACE_OUT:+$DS_TRACE_OUT/$workload}
    code=0
    env ${out:+"DS_TRACE_OUT=$out"} "$(dirname "${BASH_SOURCE[0]}")/run_trace_$workload.sh" "$@" || code=$?
    ((code == 130)) && exit 130 # Ctrl-C means all of them
    ((code == 0)) || failed+=("$workload")
done
if ((${#failed[@]})); then
    echo "failed: ${failed[*]}" >&2
    exit 1
fi
