#!/usr/bin/env bash
# DPO under ZeRO 2 and 3, with and without offload; a folder each. A run that fails does not stop the others.
source "$(dirname -- "${BASH_SOURCE[0]}")/../../../../../../scripts/_launch.sh"

positional -- "$@"
for z in 2 3; do
    for offload in true false; do
        sweep_run "$z" "$offload" "z${z}_offload_${offload}"
    done
done
sweep_end
