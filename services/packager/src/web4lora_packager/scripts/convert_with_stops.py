"""Runs llama.cpp's converter, and writes which tokens end generation: `SCRIPT STOPS CONVERTER ARG...`.

llama.cpp knows ends of turns by their texts; at one that it does not know answers go on. GGUF's keys for the
end of a turn and of a message say it outright, and the converter writes them for few models.
Run by `web4lora_llamacpp.run_converter`, never imported.
"""

from __future__ import annotations

import importlib
import runpy
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Run the converter in this process, with the keys added when it writes the file."""
    stops = [int(number) for number in sys.argv[1].split(",")]
    converter = Path(sys.argv[2])
    sys.argv = sys.argv[2:]
    sys.path[0] = str(converter.parent)
    sys.path.insert(1, str(converter.parent / "gguf-py"))
    gguf = importlib.import_module("gguf")
    write = gguf.GGUFWriter.write_header_to_file

    def with_stops(writer: Any, *arguments: Any, **options: Any) -> Any:
        values = writer.kv_data[0]
        token_keys = gguf.Keys.Tokenizer
        free = [key for key in (token_keys.EOT_ID, token_keys.EOM_ID) if key not in values]
        known = {values[key].value for key in (token_keys.EOS_ID, token_keys.EOT_ID) if key in values}
        missing = [stop for stop in stops if stop not in known]
        if len(missing) > len(free):
            raise RuntimeError(f"a GGUF has no key left to say that the tokens {missing} end generation")
        for key, stop in zip(free, missing, strict=False):
            writer.add_uint32(key, stop)
        return write(writer, *arguments, **options)

    gguf.GGUFWriter.write_header_to_file = with_stops
    runpy.run_path(str(converter), run_name="__main__")


if __name__ == "__main__":
    main()
