"""Which adapters can be a GGUF of their own, and that it is compared with what it was made from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFWriter
from web4lora_chassis.errors import DataLoss, FailedPrecondition
from web4lora_packager.adapter import Adapter
from web4lora_packager.adapter_gguf import check_adapter, require_convertible, write_plain
from web4lora_packager.layout import Layout

from tests import tiny_llama

LAYOUT = Layout({}, {}, frozenset())


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama.write_base(tmp_path_factory.mktemp("model") / "base")


def test_a_plain_adapter_can_be_converted(tmp_path: Path, base: Path) -> None:
    changes = {"rank_pattern": {"v_proj": 8}}  # each tensor brings its own rank
    require_convertible(Adapter(tiny_llama.write_adapter(tmp_path / "a", base, **changes)), LAYOUT)


@pytest.mark.parametrize("changes", [{"use_rslora": True}, {"alpha_pattern": {"q_proj": 3, "v_proj": 40}}])
def test_another_scale_is_taken_up_by_b(tmp_path: Path, base: Path, changes: dict[str, Any]) -> None:
    folder = tiny_llama.write_adapter(tmp_path / "a", base, rank_pattern={"v_proj": 8}, **changes)
    adapter, plain = Adapter(folder), Adapter(write_plain(folder, tmp_path / "plain"))
    require_convertible(adapter, LAYOUT)
    assert (plain.config.rank_stabilized, plain.config.alpha_pattern) == (False, {})
    scales = set()
    for weight, change in adapter.plan().items():
        as_gguf = plain.config.alpha / change.rank  # what llama.cpp scales by
        wanted = change.scale * (adapter.read(change.up) @ adapter.read(change.down))
        same = plain.plan()[weight]
        np.testing.assert_allclose(
            as_gguf * (plain.read(same.up) @ plain.read(same.down)), wanted, rtol=1e-4, atol=1e-6
        )
        scales.add(change.scale / as_gguf)
    assert scales != {1.0}


def test_weights_stored_the_other_way_round_are_refused(tmp_path: Path, base: Path) -> None:
    adapter = Adapter(tiny_llama.write_adapter(tmp_path / "a", base))
    transposed = frozenset({"model.layers.1.self_attn.o_proj.weight"})
    with pytest.raises(FailedPrecondition, match=r"\(in, out\)"):
        require_convertible(adapter, replace(LAYOUT, transposed=transposed))


@pytest.mark.parametrize(
    "changes",
    [
        {"modules_to_save": ["lm_head"]},
    ],
)
def test_what_a_gguf_would_apply_otherwise_is_refused(
    tmp_path: Path, base: Path, changes: dict[str, Any]
) -> None:
    adapter = Adapter(tiny_llama.write_adapter(tmp_path / "a", base, **changes))
    with pytest.raises(FailedPrecondition, match=next(iter(changes))) as caught:
        require_convertible(adapter, LAYOUT)
    assert caught.value.reason == "ADAPTER_NOT_CONVERTIBLE"


@pytest.mark.parametrize(("alpha", "lost"), [(16, 0), (8, 0), (16, 1)])
def test_a_gguf_that_is_not_the_adapter_is_found(tmp_path: Path, base: Path, alpha: float, lost: int) -> None:
    adapter = Adapter(tiny_llama.write_adapter(tmp_path / "a", base))
    path = tmp_path / "adapter.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_float32("adapter.lora.alpha", alpha)
    for name, shape in list(adapter.shapes.items())[lost:]:
        writer.add_tensor(name, np.zeros(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if (alpha, lost) == (16, 0):
        assert check_adapter(path, adapter).kind == "adapter"
        return
    with pytest.raises(DataLoss, match="failed its check"):
        check_adapter(path, adapter)
