# SPDX-License-Identifier: Apache-2.0
# To be sourced: long work in steps. Each step prints its description and how long it took.

steps_done=()

step() { # WHAT COMMAND...
  local start=$SECONDS status=0
  echo "== $1"
  "${@:2}" || status=$?
  local seconds=$((SECONDS - start))
  steps_done+=("$(printf '%4d s  %s' "$seconds" "$1")")
  if ((seconds > 2)); then echo "== took $((seconds / 60)) min $((seconds % 60)) s"; fi
  return "$status"
}

print_steps() { # of all steps so far, and what all of them took
  printf '%s\n' "${steps_done[@]}" "$(printf '%4d s  in all' "$SECONDS")"
}
