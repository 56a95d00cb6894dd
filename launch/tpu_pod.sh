#!/usr/bin/env bash
set -euo pipefail

usage() {
  cat <<'TEXT'
A run on every worker of a Cloud TPU pod slice.

  launch/tpu_pod.sh VERB [options] [-- arguments of flora_jax.main]

Verbs:
  create   ask for the slice (a queued resource)
  push     copy the committed tree to all workers and install it there
  run      start `python -m flora_jax.main --distributed ARGUMENTS` on all workers, in the background
  keep     all of the above, and again whenever the slice is taken away, until the run has ended
  state    print the state of the slice
  logs     follow the log of worker 0
  stop     stop the run and delete the slice

Options, or the environment variables in their place:
  --name=NAME         TPU_NAME
  --project=PROJECT   TPU_PROJECT
  --zone=ZONE         TPU_ZONE
  --type=TYPE         TPU_TYPE: accelerator type, such as v5litepod-16, v5p-32 or v6e-16
  --runtime=VERSION   TPU_RUNTIME; known for the types v2 to v6e
  --poll=SECONDS      TPU_POLL: how often keep looks, 60 unless told
  --spot              TPU_SPOT=1: cheaper, may be taken away at any time
  --dry-run           print the commands, run none
TEXT
}

say() { echo "$(date +%T) $*" >&2; }

fail() {
  echo "error: $*" >&2
  exit 2
}

# Shell words; quoted only where they must be, so that commands stay readable.
quote() {
  local word words=()
  for word; do
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word=${word@Q}
    words+=("$word")
  done
  echo "${words[*]}"
}

execute() { if [[ $TPU_DRY_RUN ]]; then quote "$@"; else "$@"; fi; }

tpus() { execute gcloud compute tpus "$@" "--project=$TPU_PROJECT" "--zone=$TPU_ZONE" --quiet; }

on_workers() { tpus tpu-vm ssh "$TPU_NAME" "--worker=$1" "--command=$2"; }

need() {
  local variable option
  for variable; do
    option=${variable#TPU_}
    [[ ${!variable} ]] || fail "--${option,,} is missing; give it, or set $variable"
  done
}

runtime_of_type() {
  case $1 in
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    v[234]-*) echo tpu-ubuntu2204-base ;;
    *) fail "no runtime version is known for type $1; give --runtime=VERSION" ;;
  esac
}

check_arguments() {
  local argument
  for argument; do
    case $argument in
      --workdir=gs://* | --workdir=/*) return ;;
      --workdir=*) fail "$argument is not seen by all workers; accepted: gs://... or the absolute path of a shared folder" ;;
    esac
  done
  fail "the run needs a folder that all workers see: -- --workdir=gs://BUCKET/FOLDER ..."
}

create() {
  need TPU_TYPE
  local runtime=$TPU_RUNTIME
  [[ $runtime ]] || runtime=$(runtime_of_type "$TPU_TYPE")
  tpus queued-resources create "$TPU_NAME" "--node-id=$TPU_NAME" \
    "--accelerator-type=$TPU_TYPE" "--runtime-version=$runtime" ${TPU_SPOT:+--spot}
}

delete() { tpus queued-resources delete "$TPU_NAME" --force; }

push() {
  local archive="${TMPDIR:-/tmp}/flora-$TPU_NAME.tar.gz"
  [[ -z $(git -C "$root" status --porcelain) ]] || say "note: only committed changes are pushed"
  execute git -C "$root" archive --prefix=flora/src/ "--output=$archive" HEAD
  tpus tpu-vm scp "$archive" "$TPU_NAME:flora.tar.gz" --worker=all
  on_workers all "rm -rf flora/src && tar -xzf flora.tar.gz && $worker install"
  execute rm "$archive"
}

run() {
  check_arguments "$@"
  on_workers all "$worker start $(quote "$@")"
}

stop() {
  on_workers all "$worker stop" || say "the run could not be ended; deleting the slice all the same"
  delete
}

# Of a resource; ABSENT, or UNKNOWN where gcloud gave no answer.
look_up() {
  tpus "$1" describe "$TPU_NAME" "--format=value($2)" 2>"$errors" && return
  if grep -q NOT_FOUND "$errors"; then echo ABSENT; else cat "$errors" >&2 && echo UNKNOWN; fi
}

# The request's, or the machines' own once they have been granted: READY when they can be used.
state() {
  local request machines
  request=$(look_up queued-resources state.state)
  [[ $request == ACTIVE ]] || { echo "$request" && return; }
  machines=$(look_up tpu-vm state)
  echo "${machines/ABSENT/PREEMPTED}"
}

# Each round does the one thing that the state of the slice calls for.
keep() {
  check_arguments "$@"
  need TPU_TYPE
  local slice failed=""
  # How an earlier run ended does not count.
  [[ $(state) != READY ]] || on_workers all "rm -f flora/run.status" || say "the workers do not answer yet"
  while true; do
    slice=$(state)
    case $slice in
      ABSENT) "$0" create || say "no slice could be asked for; trying again" ;;
      SUSPENDED | FAILED | PREEMPTED | TERMINATED)
        say "the slice is $slice; asking for another"
        "$0" delete || say "it could not be deleted; trying again"
        ;;
      READY) keep_run "$@" ;;
      *) say "the slice is $slice; waiting" ;;
    esac
    sleep "$TPU_POLL"
  done
}

keep_run() {
  local run
  run=$(on_workers 0 "test ! -e flora/src || $worker state") || run=UNKNOWN
  case $run in
    0)
      say "the run has ended; launch/tpu_pod.sh stop gives the slice back"
      exit 0
      ;;
    running) failed="" ;;
    "" | 143) # 143: it was told to end, and has saved
      say "starting the run"
      { "$0" push && "$0" run -- "$@"; } || say "it could not be started; trying again"
      ;;
    UNKNOWN) say "worker 0 does not answer; trying again" ;;
    *)
      # A slice that is taken away ends the run before its own state says so: look once more.
      [[ ! $failed ]] || { say "the run failed with status $run; see: launch/tpu_pod.sh logs" && exit 1; }
      failed=1
      ;;
  esac
}

show_keep() {
  echo "# every $TPU_POLL s"
  tpus queued-resources describe "$TPU_NAME" "--format=value(state.state)"
  echo "# where there is no slice"
  create
  echo "# where nothing runs on it"
  push
  run "$@"
  echo "# where it was taken away"
  delete
}

verb=${1---help}
[[ $verb != --help && $verb != -h ]] || { usage && exit 0; }
shift

root=$(cd "$(dirname "$0")/.." && pwd)
worker="bash flora/src/launch/tpu_worker.sh"
# Exported: keep starts this script again for each of its actions.
export TPU_NAME=${TPU_NAME-} TPU_PROJECT=${TPU_PROJECT-} TPU_ZONE=${TPU_ZONE-} TPU_TYPE=${TPU_TYPE-}
export TPU_RUNTIME=${TPU_RUNTIME-} TPU_SPOT=${TPU_SPOT-} TPU_POLL=${TPU_POLL-60}
TPU_DRY_RUN=""
while (($#)); do
  case $1 in
    --name=*) TPU_NAME=${1#*=} ;;
    --project=*) TPU_PROJECT=${1#*=} ;;
    --zone=*) TPU_ZONE=${1#*=} ;;
    --type=*) TPU_TYPE=${1#*=} ;;
    --runtime=*) TPU_RUNTIME=${1#*=} ;;
    --poll=*) TPU_POLL=${1#*=} ;;
    --spot) TPU_SPOT=1 ;;
    --dry-run) TPU_DRY_RUN=1 ;;
    --help | -h) usage && exit 0 ;;
    --) shift && break ;;
    *) fail "unknown option $1; arguments of flora_jax.main come after --" ;;
  esac
  shift
done
need TPU_NAME TPU_PROJECT TPU_ZONE
[[ $TPU_DRY_RUN ]] || command -v gcloud >/dev/null || fail "gcloud is not installed: https://cloud.google.com/sdk"
errors=$(mktemp -t flora.XXXXXX)
trap 'rm -f "$errors"' EXIT

case $verb in
  create | delete | push | stop | state) "$verb" ;;
  run) run "$@" ;;
  keep) if [[ $TPU_DRY_RUN ]]; then show_keep "$@"; else keep "$@"; fi ;;
  logs) on_workers 0 "tail -n 100 -F flora/run.log" ;;
  *) fail "unknown verb $verb; accepted: create, push, run, keep, state, logs, stop" ;;
esac
