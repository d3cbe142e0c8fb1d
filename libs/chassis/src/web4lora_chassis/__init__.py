"""What the services of Web4 LoRA Core must agree on: wire, bytes, states, errors and settings."""

__version__ = "0.1.0"
