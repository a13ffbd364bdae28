#!/usr/bin/env bash
# Trains on this machine and goes on by itself after a crash, from the newest checkpoint:
#   launch/local.sh --config=configs/pairs.py:aux_10 --workdir=runs/aux_10 --config.seeds=10
# Ctrl-C saves and ends it. TRIES (default 3) is how often a crashed run is started again.
set -u
for ((try = 0; try <= ${TRIES:-3}; try++)); do
  "${PYTHON:-python}" -m sire_jax.train "$@"
  status=$?
  # 0: done; 2: an error that its message explains; 130: stopped by a person.
  case $status in 0 | 2 | 130) exit $status ;; esac
  echo "Ended with status $status; starting again." >&2
done
exit $status
