#!/usr/bin/env bash
# Print "NUMBER RANK ADDRESS" for this machine: machines of the run, its place among them, and the first one's address.
#
#     experiments/launch/node.sh HOSTFILE [NUMBER]
#
# HOSTFILE has a machine a line, the first word its name or address ("node1 slots=8" as DeepSpeed writes it is fine); the
# first NUMBER of them take part, all if it is not given. This machine finds itself by its names and addresses.
set -euo pipefail

hostfile=$1
[ -r "$hostfile" ] || { echo "error: HOSTFILE=$hostfile: no such file. Write a machine a line into it." >&2; exit 2; }
mapfile -t hosts < <(sed 's/#.*//' "$hostfile" | awk 'NF { print $1 }')
number=${2:-${#hosts[@]}}
if [ "$number" -lt 1 ] || [ "$number" -gt "${#hosts[@]}" ]; then
  echo "error: NUM_NODES=$number, but HOSTFILE=$hostfile names ${#hosts[@]} machines." >&2
  exit 2
fi
mine=" $(hostname) $(hostname -s 2>/dev/null || true) $(hostname -f 2>/dev/null || true) $(hostname -I 2>/dev/null || true) "
for ((rank = 0; rank < number; rank++)); do
  if [[ $mine == *" ${hosts[rank]} "* ]]; then
    echo "$number $rank ${hosts[0]}"
    exit 0
  fi
done
echo "error: this machine ($(hostname)) is none of the first $number in HOSTFILE=$hostfile: ${hosts[*]:0:number}." \
  "Give NODE_RANK= and MASTER_ADDR= instead, or mend the file." >&2
exit 2
