#!/usr/bin/env bash
# Trains on a TPU VM or a slice of several, and goes on by itself after a crash or a preemption:
#   TPU=my-tpu ZONE=us-central2-b TYPE=v4-16 SPOT=1 launch/tpu_vm.sh \
#     --config=configs/sire.py:resnet50 --workdir=/mnt/runs/resnet50
# It runs where gcloud is set up, until training ends (so in tmux or the like), from the clone: what
# is committed is copied to all workers, which run the same command.
#
# The workdir and the data have to be on a file system that all workers mount and that outlives
# them, such as Filestore. The program does not write to gs:// addresses. MOUNT is a command that
# mounts it on each worker: MOUNT='sudo mkdir -p /mnt/runs && sudo mount 10.0.0.2:/runs /mnt/runs'.
#
# In the environment:
#   TPU, ZONE: its name and place. Without TYPE it has to be there already.
#   TYPE, VERSION (default tpu-ubuntu2204-base): what is made if it isn't there or was preempted.
#   SPOT=1: a spot one. QUEUED=1: made as a queued resource, which waits for capacity.
#   INSTALL: installs Python >= 3.11 as python3.11; the default suits Ubuntu.
#   TRIES (default 3): how often a crash is started again. Preemptions don't count.
#   POLL (default 30): seconds between looks at a TPU that is being made.
set -u
: "${TPU:?is the name of the TPU}" "${ZONE:?is its zone, such as us-central2-b}"
: "${VERSION:=tpu-ubuntu2204-base}" "${TRIES:=3}" "${POLL:=30}" "${MOUNT:=true}"
: "${INSTALL:=sudo apt-get update -q && sudo apt-get install -qy python3.11-venv}"
spot=(${SPOT:+--spot})
where=(--zone="$ZONE" --quiet)

state() { gcloud compute tpus tpu-vm describe "$TPU" "${where[@]}" --format='value(state)' 2>/dev/null; }

# Arguments as they are, for the shell of another machine.
quoted() { printf ' %q' "$@"; }

on_all_workers() { gcloud compute tpus tpu-vm ssh "$TPU" "${where[@]}" --worker=all --command="$1"; }

remove() {
  if [ -n "${QUEUED:-}" ]; then
    gcloud compute tpus queued-resources delete "$TPU" "${where[@]}" --force
  else
    gcloud compute tpus tpu-vm delete "$TPU" "${where[@]}"
  fi
}

make() {
  if [ -n "${QUEUED:-}" ]; then
    gcloud compute tpus queued-resources create "$TPU" "${where[@]}" --node-id="$TPU" \
      --accelerator-type="$TYPE" --runtime-version="$VERSION" ${spot[@]+"${spot[@]}"}
  else
    gcloud compute tpus tpu-vm create "$TPU" "${where[@]}" \
      --accelerator-type="$TYPE" --version="$VERSION" ${spot[@]+"${spot[@]}"}
  fi
}

# A TPU that is ready, with the program on all of its workers; made anew if need be.
prepare() {
  local now made=
  until now=$(state) && [ "$now" = READY ]; do
    case "$now" in
      CREATING | STARTING | RESTARTING | REPAIRING) ;;
      *)
        [ -n "${TYPE:-}" ] || {
          echo "$TPU is ${now:-not there}; with TYPE, such as v4-16, it would be made." >&2
          exit 2
        }
        # A queued one has no state until it is granted.
        if [ -z "$made" ] || [ -n "$now" ]; then
          [ -z "$now" ] || remove || exit 1
          make || exit 1
          made=1
        fi
        ;;
    esac
    sleep "$POLL"
  done
  git archive --format=tar.gz --output="$code" HEAD &&
    gcloud compute tpus tpu-vm scp "$code" "$TPU:sire_jax.tar.gz" "${where[@]}" --worker=all &&
    on_all_workers "mkdir -p sire_jax && tar -xzf sire_jax.tar.gz -C sire_jax && cd sire_jax &&
      { command -v python3.11 || { $INSTALL; }; } && python3.11 -m venv .venv &&
      .venv/bin/pip install -q 'jax[tpu]' -e . && { $MOUNT; }"
}

code=$(mktemp) log=$(mktemp)
trap 'rm -f "$code" "$log"' EXIT

# What an earlier start has left running holds the TPU. The last line is for this script: of
# several workers gcloud returns no status of theirs.
run="cd sire_jax && { pkill -f '[s]ire_jax.train' && sleep 30; }
  JAX_DISTRIBUTED=auto PYTHON=.venv/bin/python TRIES=0 launch/local.sh$(quoted "$@")
  status=\$?; echo \"A worker ended with status \$status.\"; exit \$status"
try=0
while prepare; do
  on_all_workers "$run" 2>&1 | tee "$log"
  status=${PIPESTATUS[0]}
  [ "$status" -ne 0 ] || exit 0
  # 2: an error that its message explains.
  ! grep -q "A worker ended with status 2\." "$log" || exit 2
  if [ "$(state)" = READY ]; then
    ((try++ < TRIES)) || exit "$status"
    echo "Ended with status $status; starting again." >&2
  else
    echo "$TPU was preempted; making it again." >&2
  fi
done
exit 1
