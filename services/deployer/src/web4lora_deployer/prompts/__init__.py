"""Whether a model is served the very prompts that it was trained on.

`gate` compares token by token with `training_record`, what training kept of its data; `go_template` writes
Ollama's form of a chat template.
"""
