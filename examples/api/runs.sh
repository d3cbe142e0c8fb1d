#!/usr/bin/env bash
# Runs from a shell: check a pipeline, run it, find it again. JSON goes to python3, or to jq where that is.
#
#     examples/api/runs.sh PIPELINE.yaml
set -euo pipefail
pipeline=$1

web4lora run "$pipeline" --check                                    # starts nothing; exit code 2: a file is wrong
web4lora run "$pipeline" --label team=a --json >run.json            # exit code 1: the run failed
id=$(python3 -c 'import json; print(json.load(open("run.json"))["id"])')
echo "ran $id"

web4lora runs list --state succeeded --label team=a --since 1d      # a table for people
web4lora runs show "$id" --json | python3 -c '
import json, sys
for stage in json.load(sys.stdin)["stages"]:
    print(stage["name"], stage["state"])'
