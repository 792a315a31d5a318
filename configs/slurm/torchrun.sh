#!/bin/bash
# A run on one machine, by whatever starts a command again (systemd, a queue, a shell's loop).
#   PROCESSES=8 bash configs/slurm/torchrun.sh runs/big my.yaml train.precision=bf16
# A process that dies by itself is started again with all others, at most RESTARTS times, from the newest checkpoint.
# Exit code: 0, the run is complete; 75, it was told to stop (start the same line again); else it failed.
set -euo pipefail

run=$1
shift
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-240}
code=0
told=
child=
if [[ ! -e $run/finished.json ]]; then
    trap 'told=1; [[ -z $child ]] || kill -TERM "$child" 2>/dev/null || true' TERM INT HUP
    rm -f "$run/stopped.json" # of the start before
    # in the background, so that a signal to this script is passed on at once
    torchrun --standalone --nproc-per-node "${PROCESSES:-auto}" --max-restarts "${RESTARTS:-3}" \
        -m diptych.pretrain "$@" "out=$run" &
    child=$!
    [[ -z $told ]] || kill -TERM "$child" || true # it came before there was one
    wait "$child" || code=$?
    # a trapped signal ends the wait before the child has ended
    while kill -0 "$child" 2>/dev/null; do wait "$child" || code=$?; done
fi

if [[ -e $run/finished.json ]]; then
    echo "$run is complete; to train it further, remove finished.json"
elif [[ -e $run/stopped.json ]]; then
    echo "stopped: $(cat "$run/stopped.json")"
    exit 75
elif [[ -n $told ]]; then
    echo "told to stop, and it left no stopped.json (exit code $code)"
    exit 75
else
    exit "$((code ? code : 1))"
fi
