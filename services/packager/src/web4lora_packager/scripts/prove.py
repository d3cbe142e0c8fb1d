"""Runs llama.cpp's converter on what PEFT makes of a model: `SCRIPT REQUEST.json CONVERTER ARG...`.

No model is written: when the converter would write one, each of its tensors is compared with the GGUF that
the request names, see `gguf_proof`. What was found is written beside the request, as outcome.json. Run by
`web4lora_llamacpp.run_converter`, never imported.
"""

from __future__ import annotations

import importlib
import json
import runpy
import sys
from pathlib import Path
from typing import Any


class _Compared(Exception):
    """The converter is stopped where it would write."""


def main() -> None:
    """Run the converter in this process."""
    request_path, converter = Path(sys.argv[1]), Path(sys.argv[2])
    request = json.loads(request_path.read_text(encoding="utf-8"))
    sys.argv = sys.argv[2:]
    # llama.cpp's own gguf, before anything imports the installed one.
    sys.path[0] = str(converter.parent)
    sys.path.insert(1, str(converter.parent / "gguf-py"))
    gguf: Any = importlib.import_module("gguf")
    from web4lora_chassis.errors import Internal, Web4Error

    from web4lora_packager.child import error_data
    from web4lora_packager.gguf_proof import Expected

    outcome: dict[str, Any] = {}
    try:
        expected = Expected(Path(request["base"]), Path(request["adapter"]))
        local = importlib.import_module("gguf.utility").SafetensorsLocal
        opened = local.__init__

        def wanted(self: Any, filename: Any) -> None:
            opened(self, filename)
            self.tensors = expected.sources(Path(filename).name, self.tensors)

        def compare(writer: Any, *_: Any, **__: Any) -> None:
            tensors = {name: info.tensor for each in writer.tensors for name, info in each.items()}
            writer.tensors = []  # each is freed when it was compared
            outcome.update(expected.compare(Path(request["gguf"]), tensors, gguf.LazyNumpyTensor.to_eager))
            raise _Compared

        local.__init__ = wanted
        gguf.GGUFWriter.write_header_to_file = compare
        runpy.run_path(str(converter), run_name="__main__")
        raise Internal("The converter wrote no GGUF, so nothing could be compared.")
    except _Compared:
        pass
    except Web4Error as error:
        outcome = error_data(error)
    request_path.with_name("outcome.json").write_text(json.dumps(outcome), encoding="utf-8")


if __name__ == "__main__":
    main()
