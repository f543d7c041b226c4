#!/usr/bin/env bash
# Train with torchrun, on this machine or on several:
#
#   launch/torchrun.sh --config configs/cifar10.yaml
#   NODES=2 NODE=0 HOST=first-node launch/torchrun.sh --config configs/cifar10.yaml    with NODE=1 on the other
#
# torchrun exits with 1 whenever a run did not end with 0. For a scheduler, use `distrain launch`.
set -euo pipefail
: "${PROCESSES:=}"     # EDIT: number of processes on this machine; empty: one per GPU, or 1 on CPUs
: "${NODES:=1}"        # number of machines
: "${NODE:=0}"         # number of this machine, from 0
: "${HOST:=}"          # name of the first machine, for the rendezvous
: "${PORT:=29500}"     # a free port of the first machine, open to the others
: "${RESTARTS:=0}"     # start the processes again, so often, after any failure
: "${GRACE:=120}"      # seconds to save and exit after a signal

if [ -z "$PROCESSES" ]; then
  PROCESSES=1
  if compgen -G '/dev/nvidia[0-9]*' >/dev/null; then PROCESSES=gpu; fi
fi
rendezvous=(--standalone)
if [ "$NODES" != 1 ]; then
  rendezvous=(--nnodes "$NODES" --node-rank "$NODE" --master-addr "${HOST:?the name of the first machine}" --master-port "$PORT")
fi
# As variables: only torchrun 2.12 and later has these options.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=$GRACE PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGUSR1,SIGUSR2,SIGXCPU
exec torchrun "${rendezvous[@]}" --nproc-per-node "$PROCESSES" --max-restarts "$RESTARTS" -m distrain train "$@"
