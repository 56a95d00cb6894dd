#!/usr/bin/env bash
set -euo pipefail

usage() {
  cat <<'TEXT'
N processes of one run on this machine:

  launch/local.sh [--dry-run] N ARGUMENTS OF flora_jax.main

The GPUs (CUDA_VISIBLE_DEVICES, or all) are split evenly between the processes. On a machine without
GPUs, or with DEVICES_PER_PROCESS=K, the processes have CPU devices: one, or K each.
PYTHON: the interpreter, python unless told. If one process fails, or on Ctrl-C, all are stopped.
TEXT
}

fail() {
  echo "error: $*" >&2
  exit 2
}

free_port() {
  local port
  # Below the range from which the system hands out ports by itself.
  while port=$((20000 + RANDOM % 10000)) && (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do :; done
  echo "$port"
}

visible_gpus() {
  if [[ ${CUDA_VISIBLE_DEVICES+set} ]]; then
    tr , '\n' <<<"$CUDA_VISIBLE_DEVICES"
  else
    nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null || true
  fi | grep . || true
}

# The variables that give a process its devices, one a line.
devices_of() {
  if [[ ${DEVICES_PER_PROCESS-} ]]; then
    printf '%s\n' JAX_PLATFORMS=cpu "JAX_NUM_CPU_DEVICES=$DEVICES_PER_PROCESS"
  elif ((${#gpus[@]})); then
    local share=$((${#gpus[@]} / processes))
    local own=("${gpus[@]:$1*share:share}")
    (IFS=, && echo "CUDA_VISIBLE_DEVICES=${own[*]}")
  fi
}

signal_all() {
  local process
  for process in "${started[@]}"; do kill "-$1" -- "-$process" 2>/dev/null || true; done
}

any_left() {
  local process
  # In a trap, a bare return has the status from before the trap.
  for process in "${started[@]}"; do kill -0 -- "-$process" 2>/dev/null && return 0; done
  return 1
}

# A process that waits for one that is gone may not end by itself.
stop() {
  trap '' HUP INT TERM
  signal_all TERM
  for _ in {1..300}; do
    any_left || return 0
    sleep 0.1
  done
  signal_all KILL
}

[[ ${1-} != --help && ${1-} != -h ]] || { usage && exit 0; }
dry_run=""
[[ ${1-} != --dry-run ]] || { dry_run=1 && shift; }
processes=${1-}
[[ $processes =~ ^[1-9][0-9]*$ ]] || fail "the number of processes comes first, 1 or more, not '$processes'; see --help"
shift
[[ ${DEVICES_PER_PROCESS-1} =~ ^[1-9][0-9]*$ ]] || fail "DEVICES_PER_PROCESS must be 1 or more, not '$DEVICES_PER_PROCESS'"
mapfile -t gpus < <(visible_gpus)
[[ ${DEVICES_PER_PROCESS-} ]] || ((${#gpus[@]} % processes == 0)) ||
  fail "${#gpus[@]} GPUs cannot be split between $processes processes; DEVICES_PER_PROCESS=1 runs on the CPU"

coordinator=127.0.0.1:$(free_port)
started=()
trap 'stop; exit 130' HUP INT TERM
for ((process = 0; process < processes; process++)); do
  mapfile -t devices < <(devices_of "$process")
  command=(env "${devices[@]}" "${PYTHON:-python}" -m flora_jax.main "--coordinator=$coordinator"
    "--num_processes=$processes" "--process_id=$process" "$@")
  if [[ $dry_run ]]; then
    printf '%q ' "${command[@]}"
    echo
    continue
  fi
  # Job control gives each process a group of its own, with the workers that it starts.
  set -m
  "${command[@]}" </dev/null &
  set +m
  started+=($!)
done

for _ in "${started[@]}"; do
  status=0
  wait -n || status=$?
  ((status == 0)) || { stop && exit "$status"; }
done
