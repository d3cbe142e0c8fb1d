"""Scripts that `web4lora_llamacpp.run_converter` runs; alone, so that they shadow no module by its name."""
