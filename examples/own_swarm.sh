#!/usr/bin/env bash
# A whole swarm from a folder of your own pictures, on this machine, with one peer that trains everything in turn.
#   examples/own_swarm.sh MY_IMAGES OUT      (MY_IMAGES: an ImageFolder with metadata.jsonl or metadata.csv)
set -euo pipefail
images=$1 out=$2
swarm=(.venv/bin/paris-swarm)
mkdir -p "$out"
"${swarm[@]}" prepare "$images" "$out/data"
"${swarm[@]}" --home "$out/organiser" init "$out/data" -o "$out/plan" -k 2 --steps 300 --checkpoint-every 60 --lease 60
"${swarm[@]}" --home "$out/organiser" bootstrap "$out/plan" --json >"$out/bootstrap.json" &
trap 'kill %1' EXIT
until [ -s "$out/bootstrap.json" ]; do sleep 0.5; done
invite=$(.venv/bin/python -c 'import json, sys; print(json.load(open(sys.argv[1]))["invite"])' "$out/bootstrap.json")
"${swarm[@]}" --home "$out/peer" join "$invite" --claim-cluster --claim-router --data "$out/data" &
trap 'kill %1 %2' EXIT
until "${swarm[@]}" --home "$out/reader" assemble "$invite" -o "$out/model"; do sleep 30; done
echo "Now: ${swarm[*]} sample $out/model --prompt '...' -o picture.png"
