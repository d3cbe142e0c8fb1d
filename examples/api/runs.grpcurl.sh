#!/usr/bin/env bash
# Runs by grpcurl, without any file of ours: reflection is on.
#
#     examples/api/runs.grpcurl.sh [GATEWAY]
#
# The token is the stack's: .web4lora/token of a native one, .secrets/token of one in containers.
set -euo pipefail
gateway=${1:-127.0.0.1:8461}
service=web4.lora.v1.GatewayService
call() { grpcurl -plaintext -H "authorization: Bearer $(cat "${TOKEN_FILE:-.web4lora/token}")" "$@"; }

call "$gateway" list
call "$gateway" $service/GetGatewayInfo
call -d '{"page_size": 10, "states": ["RUN_STATE_SUCCEEDED"], "labels": {"team": "a"}}' "$gateway" $service/ListRuns
call -d '{"id": "latest"}' "$gateway" $service/WatchRun              # snapshots until it has ended

# A pipeline that can't be done: the error names each field, and says what to do.
if call -d '{"validate_only": true, "pipeline": {"name": "No Name"}}' "$gateway" $service/CreateRun; then
    exit 1
fi
