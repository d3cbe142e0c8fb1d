"""The deployer: puts a GGUF into a runtime on this machine, tests it there and keeps it running.

`deploy` and `verify` are the two jobs, done in a child process (`worker`). `runtimes` holds what can take a
model: llama-server, Ollama and Docker Model Runner meet one Protocol. `deployments` is what is deployed, on
disk; `supervisor`, in the service, keeps llama-server processes as those records want them.
"""
