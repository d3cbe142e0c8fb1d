"""The packager: merges an adapter into its base, converts to GGUF, quantizes, and checks what it made.

`merge`, `convert`, `quantize`, `check` and `modelfile` do one step each and know neither gRPC nor jobs;
`worker` strings them together in a job's child process; `service` answers the calls.
"""
