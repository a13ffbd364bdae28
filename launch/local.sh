#!/usr/bin/env bash
# Trains on this machine and goes on by itself after a crash, from the newest checkpoint:
#   launch/local.sh --config=configs/pairs.py:aux_10 --workdir=runs/aux_10 --config.seeds=10
# Ctrl-C saves and ends it, SIGTERM and SIGUSR1 too. In the environment:
#   PROCESSES (default 1): so many processes that train one network together. One is enough for all
#     devices of a machine; several show whether a job would run on several machines.
#   TRIES (default 3): how often a crashed run is started again.
#   GRACE (default 30): seconds that processes have to end by themselves once one has failed.
#   PYTHON (default python): what runs it.
# With JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID in the environment, or with
# JAX_DISTRIBUTED=auto, it is this machine's part of a job of several machines.

# -m: a process group for each process, so that Ctrl-C reaches them once, through this script.
set -um
: "${PROCESSES:=1}" "${TRIES:=3}" "${GRACE:=30}" "${PYTHON:=python}"
pids=() stopped=

pass_on() {
  stopped=$1
  ((${#pids[@]} == 0)) || kill -s "$1" "${pids[@]}" 2>/dev/null
}
trap 'pass_on INT' INT
trap 'pass_on TERM' TERM HUP
trap 'pass_on USR1' USR1

start() {
  local i together=()
  pids=()
  for ((i = 0; i < PROCESSES; i++)); do
    if ((PROCESSES > 1)); then
      ((i > 0)) || address=127.0.0.1:$(free_port)
      # Collectives of CPU processes abort where XLA counts too few cores.
      together=(JAX_COORDINATOR_ADDRESS="$address" JAX_NUM_PROCESSES="$PROCESSES"
        JAX_PROCESS_ID="$i" NPROC="${NPROC:-16}")
    fi
    env ${together[@]+"${together[@]}"} "$PYTHON" -m sire_jax.train "$@" &
    pids+=($!)
  done
  # A signal that came before there was a process to pass it on to.
  [ -z "$stopped" ] || pass_on "$stopped"
}

free_port() {
  "$PYTHON" -c 'import socket; s = socket.create_server(("", 0)); print(s.getsockname()[1])'
}

# Waits for all to end; returns the first status that is not 0.
finish() {
  local pid running status=0 failed_at=
  while ((${#pids[@]})); do
    running=()
    for pid in "${pids[@]}"; do
      if kill -0 "$pid" 2>/dev/null; then
        running+=("$pid")
      elif ((status == 0)); then
        wait "$pid" || { status=$? failed_at=$SECONDS; }
      fi
    done
    pids=(${running[@]+"${running[@]}"})
    if ((${#pids[@]} && status && SECONDS - failed_at >= GRACE)); then
      kill -s KILL "${pids[@]}" 2>/dev/null
    fi
    # In the background: a signal ends the wait, and the terminal stays this script's.
    ((${#pids[@]} == 0)) || { sleep 0.2 & wait $!; }
  done
  return "$status"
}

for ((try = 0; ; try++)); do
  start "$@"
  finish
  status=$?
  # 0: done; 2: an error that its message explains; 85: saved at a signal; 130: saved at Ctrl-C.
  case $status in 0 | 2 | 85 | 130) exit "$status" ;; esac
  ((try < TRIES)) && [ -z "$stopped" ] || exit "$status"
  echo "Ended with status $status; starting again." >&2
done
