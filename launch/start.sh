#!/usr/bin/env bash
# Runs one process of a training until the training is finished.
#
#     start.sh [--restarts N] [--wait SECONDS] -- COMMAND [ARGUMENT...]
#
# SIGTERM is passed on to COMMAND, which saves the state. The exit status says what the cluster should do next:
#
#   0     the training is finished
#   75    it was stopped by SIGTERM, here or on another host: start the same command again
#   2     the command cannot be parsed: starting it again is of no use
#   other an error, here or on another host: start the same command again, a limited number of times
#
# With --restarts N, the script itself starts the command again: always after 75 without a signal to this process, and up
# to N times after errors. Without it, the cluster does that. --wait (15 seconds) is the time before a restart, in which
# the other hosts notice that this process is gone.
set -uo pipefail

usage() {
  echo "start.sh: $1; usage: start.sh [--restarts N] [--wait SECONDS] -- COMMAND [ARGUMENT...]" >&2
  exit 2
}

restarts=0
pause=15
while [ $# -gt 0 ]; do
  case "$1" in
    --restarts|--wait)
      [[ "${2-}" =~ ^[0-9]{1,6}$ ]] || usage "$1 is '${2-}', which is not a number"
      if [ "$1" = --restarts ]; then restarts=$2; else pause=$2; fi
      shift 2 ;;
    --) shift; break ;;
    *) usage "unknown argument '$1'" ;;
  esac
done
[ $# -gt 0 ] || usage "the command is missing"

# Without this variable, qi2 exits with 0 after SIGTERM, as if the training were finished.
export QI2_STOPPED_STATUS="${QI2_STOPPED_STATUS:-75}"
child=
terminated=

# shellcheck disable=SC2329  # the trap calls it
pass_on() {
  terminated=yes
  if [ -n "$child" ]; then kill -TERM "$child" 2> /dev/null; fi
}
trap pass_on TERM INT

# Waits for $child and sets $status. A signal interrupts `wait`, but not the child's last save.
await() {
  while true; do
    wait "$child"
    status=$?
    kill -0 "$child" 2> /dev/null || return
  done
}

# A signal that came while the child was started did not reach it.
forward() {
  if [ -n "$terminated" ]; then
    kill -TERM "$child" 2> /dev/null || true
  fi
}

failures=0
while [ -z "$terminated" ]; do
  "$@" &
  child=$!
  forward
  await
  if [ -n "$terminated" ] && [ "$status" = 143 ]; then
    status=$QI2_STOPPED_STATUS  # the signal came before the command could handle it; nothing was done yet
  fi
  if [ "$status" = 0 ] || [ "$status" = 2 ] || [ "$restarts" = 0 ] || [ -n "$terminated" ]; then
    exit "$status"
  fi
  if [ "$status" != "$QI2_STOPPED_STATUS" ]; then
    failures=$((failures + 1))
    if [ "$failures" -gt "$restarts" ]; then
      echo "start.sh: status $status, and no restart is left of $restarts" >&2
      exit "$status"
    fi
  fi
  echo "start.sh: status $status; starting again in $pause s ($failures of $restarts restarts after errors)" >&2
  sleep "$pause" &
  child=$!
  forward
  await
done
exit "$QI2_STOPPED_STATUS"
