"""llama.cpp: its pinned source, its tools compiled once into the cache, and llama-server.

`ensure_built` fetches the source, checks its hash, compiles it, tests the build and returns the tools;
`find_working` tests and never compiles, `find` does neither. `LlamaServer` serves one GGUF file; `run_tool`
runs the other tools. `levels` says which sets of processor instructions are tried, one after the other.
"""

from web4lora_llamacpp.build import ensure_built, find_working
from web4lora_llamacpp.converter import run_converter
from web4lora_llamacpp.model_name import general_name
from web4lora_llamacpp.run_tool import run_tool, tail
from web4lora_llamacpp.server import LlamaServer
from web4lora_llamacpp.source import SDIST, find_source
from web4lora_llamacpp.tools import LlamaCpp, find

__all__ = [
    "SDIST", "LlamaCpp", "LlamaServer", "ensure_built", "find", "find_source", "find_working",
    "general_name", "run_converter", "run_tool", "tail",
]  # fmt: skip
