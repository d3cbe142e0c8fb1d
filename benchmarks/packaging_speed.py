"""Packaging beside the usual chain: PEFT's merge_and_unload and save, llama.cpp's converter, llama-quantize.

    .venv/bin/python benchmarks/packaging_speed.py
    .venv/bin/python benchmarks/packaging_speed.py --shape 1.5B     # random weights of a Llama's shape

Packages two adapters on attention, one after the other, each both ways and each way in processes of its own.
Ours does more: it proves the merge, loads every file, hashes and stores. Seconds are those of the clock, and
mean something on an otherwise idle machine alone; processor seconds stand beside them. Memory is what is
anonymous, of all processes together. Read and written are bytes that went through calls; what is mapped is
not counted as read.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import psutil
from safetensors.numpy import save_file
from web4.lora.v1 import packager_pb2
from web4lora_chassis.artifacts import ArtifactRef, open_store
from web4lora_chassis.model_files.model_folder import read_model_folder
from web4lora_chassis.rpc import ref_message
from web4lora_chassis.settings import Settings, load
from web4lora_llamacpp import ensure_built
from web4lora_packager.worker import run_package
from web4lora_trainer.base_model import resolve

SHAPES = {"1.5B": (2048, 5632, 24, 16), "6.9B": (4096, 11008, 32, 32)}  # width, inner width, layers, heads
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")
RANK = 16


def smollm2() -> Path:
    """Return SmolLM2-135M's folder, made in the cache unless it is there."""
    return resolve("smollm2-135m-instruct", "", load(Settings).cache, lambda _: None).decoder.folder


def write_shape(folder: Path, shape: str) -> Path:
    """Write a Llama of random weights with SmolLM2's tokenizer, a file for each layer."""
    width, inner, layers, heads = SHAPES[shape]
    source = smollm2()
    folder.mkdir(parents=True)
    for path in source.iterdir():
        if path.suffix != ".safetensors" and path.name != "model.safetensors.index.json":
            shutil.copyfile(path, folder / path.name)
    config = json.loads((source / "config.json").read_text())
    config |= {
        "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": heads, "head_dim": width // heads,
        "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    random = np.random.default_rng(0)
    index: dict[str, str] = {}

    def write(name: str, sizes: dict[str, tuple[int, ...]]) -> None:
        tensors = {
            key: (random.standard_normal(size, np.float32) * 0.02).astype(ml_dtypes.bfloat16)
            for key, size in sizes.items()
        }
        save_file(tensors, folder / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(sizes, name))

    for layer in range(layers):
        start = f"model.layers.{layer}."
        square = {f"{start}self_attn.{name}.weight": (width, width) for name in MODULES}
        wide = {f"{start}mlp.{name}_proj.weight": (inner, width) for name in ("gate", "up")}
        norms = {f"{start}{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
        down = {f"{start}mlp.down_proj.weight": (width, inner)}
        write(f"model-{layer:05}.safetensors", {**square, **wide, **down, **norms})
    vocabulary = (config["vocab_size"], width)
    write("model-end.safetensors", {
        "model.embed_tokens.weight": vocabulary, "lm_head.weight": vocabulary, "model.norm.weight": (width,),
    })  # fmt: skip
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


def write_adapter(folder: Path, base: Path, seed: int) -> Path:
    """Write a random adapter on attention."""
    random = np.random.default_rng(seed)
    tensors = {}
    for name, tensor in read_model_folder(base).tensors.items():
        module = name.removesuffix(".weight")
        if module.endswith(MODULES):
            for part, size in (("A", (RANK, tensor.shape[1])), ("B", (tensor.shape[0], RANK))):
                values = random.standard_normal(size, np.float32) * 0.02
                tensors[f"base_model.model.{module}.lora_{part}.weight"] = values
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps({**config, "target_modules": list(MODULES)}))
    return folder


def chain(base: Path, adapter: Path, work: Path) -> None:
    """Package as everybody does."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    llama = ensure_built(load(Settings).cache, lambda _: None)
    work.mkdir()
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(work / "merged")
    for path in base.iterdir():
        if path.name.startswith("tokenizer"):
            shutil.copyfile(path, work / "merged" / path.name)
    del model
    whole = work / "f16.gguf"
    run = {"check": True, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run(
        [sys.executable, llama.converter, work / "merged", "--outtype", "f16", "--outfile", whole], **run
    )
    subprocess.run([llama.quantize, whole, work / "model.Q4_K_M.gguf", "Q4_K_M"], **run)


def ours(base: ArtifactRef, adapter: ArtifactRef, work: Path) -> None:
    """Package as a job does."""
    work.mkdir()
    started, phase = time.monotonic(), ""

    def report(progress: Any) -> None:
        nonlocal phase
        if progress.phase != phase:
            phase = progress.phase
            print(f"    {time.monotonic() - started:7.1f} s {phase}", file=sys.stderr, flush=True)
        if "taken" in progress.message:
            print(f"              {progress.message}", file=sys.stderr, flush=True)

    spec = packager_pb2.PackageSpec(
        name="benchmark",
        base=ref_message(base),
        adapter=ref_message(adapter),
        package=packager_pb2.PackageSettings(quantizations=["Q4_K_M"], gguf_type="F16"),
    )
    run_package(spec, SimpleNamespace(work_dir=work, report=report))  # type: ignore[arg-type]


def measured(arguments: list[str], env: dict[str, str]) -> dict[str, float]:
    """Run a way in a process of its own; return its figures."""
    command = [sys.executable, __file__, *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **env})
    peak = 0

    def watch() -> None:
        nonlocal peak
        while process.poll() is None:
            peak = max(peak, sum(_anonymous(psutil.Process(process.pid))))
            time.sleep(0.05)

    thread = threading.Thread(target=watch)
    thread.start()
    output, _ = process.communicate()
    thread.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed.")
    return {**json.loads(output.splitlines()[-1]), "memory": peak / 1e9}


def _anonymous(root: psutil.Process) -> Iterator[int]:
    try:
        for process in (root, *root.children(recursive=True)):
            for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
                if line.startswith("RssAnon:"):
                    yield int(line.split()[1]) << 10
    except (psutil.NoSuchProcess, OSError):
        return


def _one(way: str, base: str, adapter: str, work: str) -> None:
    """Do one packaging in this process, and print its figures: a child's use counts when it has ended."""
    started = time.monotonic()
    if way == "chain":
        chain(Path(base), Path(adapter), Path(work))
    else:
        refs = [ArtifactRef.from_json(json.loads(text)) for text in (base, adapter)]
        ours(refs[0], refs[1], Path(work))
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    print(json.dumps({
        "seconds": time.monotonic() - started,
        "processor": sum(each.ru_utime + each.ru_stime for each in used),
        "read": int(counts["rchar"]) / 1e9,
        "written": int(counts["wchar"]) / 1e9,
    }))  # fmt: skip


def main() -> None:
    """Compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", choices=("SmolLM2", *SHAPES), default="SmolLM2")
    parser.add_argument(
        "--folder", type=Path, help="where to work, on a disk with room; a temporary folder if absent"
    )
    shape, place = (vars(parser.parse_args())[key] for key in ("shape", "folder"))
    with tempfile.TemporaryDirectory(dir=place) as name:
        folder = Path(name)
        base = smollm2() if shape == "SmolLM2" else write_shape(folder / "base", shape)
        cache = load(Settings).cache
        store = open_store(load(Settings, store=(folder / "store").as_uri()))
        env = {
            "WEB4LORA_HOME": str(folder / "home"), "WEB4LORA_CACHE": str(cache),
            "WEB4LORA_STORE": (folder / "store").as_uri(),
        }  # fmt: skip
        files = {path.name: path for path in base.iterdir() if path.is_file()}
        stored = store.put("base_model", "base", files, link=False)
        print(f"{shape}: clock s, processor s, anonymous GB, read GB, written GB")
        for number in (1, 2):
            adapter = write_adapter(folder / f"adapter-{number}", base, number)
            parts = {path.name: path for path in adapter.iterdir()}
            ref = store.put("adapter", "adapter", parts, inputs=[stored], link=False)
            for way in ("chain", "ours"):
                work = str(folder / f"{way}-{number}")
                refs = [json.dumps(each.to_json()) for each in (stored, ref)]
                what = [str(base), str(adapter)] if way == "chain" else refs
                found = measured(["--one", way, *what, work], env)
                keys = ("seconds", "processor", "memory", "read", "written")
                print(
                    f"  adapter {number}, {way:5}  " + "  ".join(f"{found[key]:8.2f}" for key in keys),
                    flush=True,
                )
                shutil.rmtree(work)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        _one(*sys.argv[2:])
    else:
        main()
