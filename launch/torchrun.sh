#!/usr/bin/env bash
# Train with torchrun, on this machine or on several:
#
#   launch/torchrun.sh --config configs/cifar10.yaml
#   NODES=2 NODE=0 HOST=first-node launch/torchrun.sh --config configs/cifar10.yaml    and NODE=1 on the other
#
# torchrun's own exit code is 1 for whatever ended a run: for a scheduler take `distrain launch`.
set -euo pipefail
: "${PROCESSES:=gpu}"  # EDIT: processes on this machine; gpu: one for each GPU
: "${NODES:=1}"        # machines
: "${NODE:=0}"         # this one, counted from 0
: "${HOST:=}"          # name of the first one, where all meet
: "${PORT:=29500}"     # a port that is free there, and open to the others
: "${GRACE:=120}"      # seconds to save and leave after a signal

meeting=(--standalone)
if [ "$NODES" -gt 1 ]; then
  meeting=(--nnodes "$NODES" --node-rank "$NODE" --master-addr "${HOST:?the name of the first machine}" --master-port "$PORT")
fi
# As variables: torchrun knows the options since 2.12 only.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=$GRACE PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGUSR1,SIGUSR2
exec torchrun "${meeting[@]}" --nproc-per-node "$PROCESSES" -m distrain train "$@"
