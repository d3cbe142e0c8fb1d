"""What is taken from an earlier file: the bytes are those of llama-quantize on the whole 16-bit file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from web4lora_chassis.artifacts import ArtifactRef, ArtifactStore, open_store
from web4lora_chassis.model_files.gguf import GgufHeader, read_gguf
from web4lora_chassis.settings import Settings, load
from web4lora_llamacpp import LlamaCpp
from web4lora_packager.convert import Converted, convert
from web4lora_packager.layout import Layout
from web4lora_packager.merge import Merge
from web4lora_packager.quantize import importance_matrix, quantize
from web4lora_packager.reuse import Reuse

from tests import tiny_llama

pytestmark = pytest.mark.timeout(600)
TYPES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "IQ4_XS")
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")


def _merged(llama: LlamaCpp, base: Path, folder: Path, **adapter: Any) -> tuple[Path, Converted]:
    made = tiny_llama.write_adapter(folder / "adapter", base, **adapter)
    from web4lora_chassis.model_files.model_folder import read_model_folder

    names = {name: name for name in read_model_folder(base).tensors}
    merge = Merge(base, made, Layout(names, {}, frozenset()))
    target = folder / "merged_model.gguf"
    converted = convert(
        llama, base, target,
        gguf_type="F16", name="tiny", merge=merge, log=folder / "log", report=lambda _: None,
    )  # fmt: skip
    assert converted is not None
    return target, converted


class Made:
    """A base, and two adapters on the same modules merged into it."""

    def __init__(self, llama: LlamaCpp, folder: Path) -> None:
        self.llama = llama
        base = tiny_llama.write_base(folder / "base", tied=False)
        self.one, self.of_one = _merged(llama, base, folder / "one", modules=MODULES, seed=1)
        self.two, self.of_two = _merged(llama, base, folder / "two", modules=MODULES, seed=2)
        self.matrix = folder / "importance_matrix.gguf"
        (folder / "text").write_text("The quick brown fox jumps over the lazy dog. " * 400)
        importance_matrix(
            llama, self.one, folder / "text", self.matrix,
            chunks=2, log=folder / "log", report=lambda _: None,
        )  # fmt: skip

    def quantize(
        self,
        whole: Path,
        target: Path,
        kind: str,
        matrix: Path | None,
        taken: Mapping[str, Path] | None = None,
    ) -> bytes:
        quantize(
            self.llama, whole, target,
            quantization=kind, parameters=1, matrix=matrix, taken=taken,
            log=target.with_name("log"), report=lambda _: None,
        )  # fmt: skip
        return target.read_bytes()


@pytest.fixture(scope="module")
def made(llama_cpp: LlamaCpp, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(llama_cpp, tmp_path_factory.mktemp("made"))


class Shop:
    """A store, and the search of a run in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store: ArtifactStore = open_store(load(Settings, store=(folder / "store").as_uri()))
        (folder / "config.json").write_text("{}")
        self.base = self.put("base_model", "tiny", folder / "config.json")
        self.told: list[str] = []
        self.reuse = self.search()

    def put(self, kind: str, name: str, path: Path, **more: Any) -> ArtifactRef:
        return self.store.put(kind, name, {path.name: path}, link=False, **more)

    def search(self, base: ArtifactRef | None = None, version: str = "1") -> Reuse:
        work = self.folder / "work"
        work.mkdir(exist_ok=True)
        return Reuse(
            self.store, base or self.base, ("demo",), version, work,
            lambda progress: self.told.append(progress.message),
        )  # fmt: skip

    def keep(
        self, path: Path, kind: str, tensors: Mapping[str, str], matrix: ArtifactRef | None = None
    ) -> ArtifactRef:
        """Store what an earlier run quantized."""
        noted = self.reuse.note(tensors, [self.base])
        parameters = self.reuse.parameters(kind, "F16", matrix)
        return self.put("gguf", "demo", path, inputs=[noted], parameters=parameters, tools={"llama.cpp": "1"})


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    return Shop(tmp_path)


def _header(made: Made) -> GgufHeader:
    return read_gguf(made.two)


@pytest.mark.parametrize("with_matrix", [False, True], ids=["no matrix", "matrix"])
@pytest.mark.parametrize("kind", TYPES)
def test_the_bytes_are_those_of_quantizing_everything(
    made: Made, shop: Shop, tmp_path: Path, kind: str, with_matrix: bool
) -> None:
    matrix = made.matrix if with_matrix else None
    ref = shop.put("report", "matrix", made.matrix) if with_matrix else None
    earlier = tmp_path / f"model.{kind}.gguf"
    made.quantize(made.one, earlier, kind, matrix)
    shop.keep(earlier, kind, made.of_one.tensors, ref)
    taken = shop.reuse.take(kind, "F16", ref, _header(made), made.of_two.tensors)
    # All matrices but the 8 of 2 layers that training touched.
    matrices = {tensor.name for tensor in _header(made).tensors if len(tensor.shape) > 1}
    assert taken.keys() == {name for name in matrices if "attn_" not in name}
    assert len(taken) == 8
    quick = made.quantize(made.two, tmp_path / "quick.gguf", kind, matrix, taken)
    assert quick == made.quantize(made.two, tmp_path / "long.gguf", kind, matrix)
    assert not list(tmp_path.glob("hybrid-*"))


def test_without_a_copy_in_the_kernel_the_bytes_are_the_same(
    made: Made, shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier = tmp_path / "model.Q4_K_M.gguf"
    made.quantize(made.one, earlier, "Q4_K_M", None)
    shop.keep(earlier, "Q4_K_M", made.of_one.tensors)
    taken = shop.reuse.take("Q4_K_M", "F16", None, _header(made), made.of_two.tensors)
    monkeypatch.delattr("os.copy_file_range", raising=False)  # as on macOS
    quick = made.quantize(made.two, tmp_path / "quick.gguf", "Q4_K_M", None, taken)
    assert quick == made.quantize(made.two, tmp_path / "long.gguf", "Q4_K_M", None)


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("another llama.cpp", "another llama.cpp made it, 1"),
        ("another base", "it was made with another base model"),
        ("another matrix", "it was made with another importance matrix"),
        ("another 16-bit type", "it was made with another 16-bit type"),
        ("all trained", "training changed all of the same tensors"),
        ("a damaged file", "is not what its digest says"),
    ],
)
def test_what_does_not_fit_is_not_taken_and_the_reason_is_told(
    made: Made, shop: Shop, tmp_path: Path, what: str, told: str
) -> None:
    earlier = tmp_path / "model.Q8_0.gguf"
    made.quantize(made.one, earlier, "Q8_0", None)
    kept = shop.keep(earlier, "Q8_0", made.of_one.tensors)
    other = shop.put("base_model", "other", made.matrix)
    search = shop.search(
        other if what == "another base" else None, "2" if what == "another llama.cpp" else "1"
    )
    tensors = made.of_two.tensors
    if what == "all trained":
        tensors = dict.fromkeys(tensors, "0" * 64)
    if what == "a damaged file":
        stored = tmp_path / "store" / kept.prefix / earlier.name
        stored.chmod(0o644)
        stored.write_bytes(stored.read_bytes()[:-1] + b"?")
    taken = search.take(
        "Q8_0", "BF16" if what == "another 16-bit type" else "F16",
        other if what == "another matrix" else None, _header(made), tensors,
    )  # fmt: skip
    assert taken == {}
    (line,) = shop.told
    assert line.startswith(f"no tensor taken from {kept}: ")
    assert told in line


def test_nothing_is_taken_from_a_file_with_other_tensors(made: Made, shop: Shop, tmp_path: Path) -> None:
    # Which type a tensor gets depends on the others too: a head of its own changes the embedding's.
    earlier = tmp_path / "model.Q8_0.gguf"
    made.quantize(made.one, earlier, "Q8_0", None)
    kept = shop.keep(earlier, "Q8_0", made.of_one.tensors)
    header = _header(made)
    fewer = GgufHeader(header.values, [each for each in header.tensors if each.name != "output.weight"])
    assert shop.reuse.take("Q8_0", "F16", None, fewer, made.of_two.tensors) == {}
    assert shop.told == [f"no tensor taken from {kept}: it has other tensors"]


def test_several_earlier_files_add_up(made: Made, shop: Shop, tmp_path: Path) -> None:
    earlier = tmp_path / "model.Q8_0.gguf"
    made.quantize(made.two, earlier, "Q8_0", None)
    names = sorted(name for name in made.of_two.tensors if "ffn_" in name and "norm" not in name)
    half = dict.fromkeys(names[:3], "0" * 64)
    for changed in (half, dict.fromkeys(names[3:], "0" * 64)):
        shop.keep(earlier, "Q8_0", {**made.of_two.tensors, **changed})
    taken = shop.reuse.take("Q8_0", "F16", None, _header(made), made.of_two.tensors)
    assert set(names) <= taken.keys()
    assert len(set(taken.values())) == 2
    assert json.dumps(sorted(half)) == json.dumps(names[:3])


def test_the_digests_are_those_of_the_data(made: Made) -> None:
    import hashlib

    header = read_gguf(made.one)
    assert made.of_one.tensors.keys() == {tensor.name for tensor in header.tensors}
    data = np.memmap(made.one, mode="r")
    for tensor in header.tensors:
        start = header.data_at + tensor.offset
        digest = hashlib.sha256(data[start : start + tensor.size_bytes].tobytes()).hexdigest()
        assert made.of_one.tensors[tensor.name] == digest
