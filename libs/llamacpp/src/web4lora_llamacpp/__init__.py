"""llama.cpp: its pinned source, its tools compiled once into the cache, and llama-server.

`ensure_built` fetches the source, checks its hash, compiles it and returns the tools; `find` returns them
when they are there and never builds. `LlamaServer` serves one GGUF file; `follow` runs the other tools.
"""

from web4lora_llamacpp.build import ensure_built
from web4lora_llamacpp.follow import follow, tail
from web4lora_llamacpp.server import LlamaServer
from web4lora_llamacpp.source import SDIST
from web4lora_llamacpp.tools import LlamaCpp, find

__all__ = ["SDIST", "LlamaCpp", "LlamaServer", "ensure_built", "find", "follow", "tail"]
