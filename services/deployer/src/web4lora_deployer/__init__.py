"""The deployer: puts a model into a runtime on this machine, tests it there and keeps it running.

Its jobs (`serving.deploy`, `testing.verify`, `testing.evaluate`, `registry.push`) run in a child process,
`worker`; `service` answers for the deployments themselves. `runtimes` holds what can take a model:
llama-server, Ollama and Docker Model Runner meet one Protocol. `records` is what is deployed, on disk;
`prompts` proves that a model is served what it was trained on; `suite` asks and grades, `report` tells it.
"""
