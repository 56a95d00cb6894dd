#!/usr/bin/env bash
# What launch/tpu_pod.sh runs on each worker. ~/flora holds src/, .venv/, run.log, and
#   run.lock    locked while the run lives, whatever ends it
#   run.group   its process group
#   run.status  its exit status; absent where it runs, or was killed with the machine
set -euo pipefail

usage="launch/tpu_worker.sh install | start [arguments of flora_jax.main] | state | stop"

running() { ! flock --nonblock run.lock true; }

install() {
  # The machines come with an older Python.
  python3 -m pip install --user --quiet uv
  local uv="$HOME/.local/bin/uv"
  "$uv" venv --quiet --allow-existing --python 3.11 .venv
  # etils[epath-gcs]: folders at gs://
  "$uv" pip install --quiet --python .venv/bin/python --constraint src/constraints.txt \
    --requirement src/requirements.txt "jax[tpu]" "etils[epath-gcs]"
}

start() {
  exec {lock}>run.lock
  if ! flock --nonblock "$lock"; then
    echo "error: a run is going on this worker; launch/tpu_pod.sh stop ends it" >&2
    exit 1
  fi
  rm -f run.status
  # shellcheck disable=SC2016  # For the inner shell.
  setsid bash -c '
    cd src
    status=0
    ../.venv/bin/python -m flora_jax.main --distributed "$@" || status=$?
    echo "$status" >../run.status' run "$@" >run.log 2>&1 </dev/null &
  echo $! >run.group
}

state() {
  if [[ -e run.status ]]; then cat run.status; elif running; then echo running; fi
}

stop() {
  running || return 0
  kill -TERM -- "-$(cat run.group)"
  # The run saves where it is before it ends.
  flock --timeout 120 run.lock true
}

case ${1-} in
  install | start | state | stop)
    cd "$(dirname "$0")/../.."
    "$@"
    ;;
  --help | -h) echo "$usage" ;;
  *)
    echo "error: unknown verb '${1-}'; accepted: $usage" >&2
    exit 2
    ;;
esac
