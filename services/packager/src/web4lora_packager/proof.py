"""Proves a merge by what PEFT itself makes of base and adapter. Imports torch, so it runs in a child process.

Nothing here is shared with the merge: PEFT puts its own layers into the model that Transformers builds, says
which tensors the adapter must have, and computes each update. Every parameter of the merged model, read as
Transformers will read it, ties included, must then be base plus update, or base.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper, get_peft_model_state_dict
from safetensors import safe_open
from web4lora_chassis.errors import DataLoss, FailedPrecondition
from web4lora_chassis.model_files.model_folder import read_model_folder
from web4lora_chassis.model_files.safetensors import read_shard

from web4lora_packager import skeleton
from web4lora_packager.adapter import ADAPTER_FILES

_PIECES, _PIECE_ROWS = 8, 32
_PEFT_PREFIX = "base_model.model."
_ADAPTER = "default"
# Of a sum of products in float32, relative to the sum of their sizes; far above what another order gives.
SLACK = 2.0**-17


class Files:
    """Tensors of safetensors files, read some rows at a time."""

    def __init__(self, paths: Mapping[str, Path]) -> None:
        self._paths = paths
        self._open: dict[Path, Any] = {}

    def __contains__(self, name: object) -> bool:
        return name in self._paths

    def names(self) -> set[str]:
        """Return the names of all tensors."""
        return set(self._paths)

    def slice(self, name: str) -> Any:
        """Return a tensor that is read where it is indexed."""
        path = self._paths[name]
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt")
        return self._open[path].get_slice(name)

    def whole(self, name: str) -> torch.Tensor:
        """Return a tensor whose values stay in the file until they are used."""
        self.slice(name)
        tensor: torch.Tensor = self._open[self._paths[name]].get_tensor(name)
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        return tuple(self.slice(name).get_shape())

    def rows(self, name: str, start: int, end: int) -> torch.Tensor:
        """Return rows of a tensor."""
        view = self.slice(name)
        rows: torch.Tensor = view[start:end] if view.get_shape() else view[()]
        return rows


class Model:
    """A model as Transformers reads it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = Files({name: tensor.path for name, tensor in read_model_folder(folder).tensors.items()})
        model = skeleton.build(folder)
        self.tied = skeleton.tied(model)
        self.names = skeleton.file_names(model, self.files.names())
        self.parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]

    def tensor_of(self, parameter: str) -> str | None:
        """Return the tensor in the files that a parameter is read from."""
        if parameter in self.names:
            return self.names[parameter]
        group = self.tied.get(parameter, parameter)
        others = [group, *(name for name, source in self.tied.items() if source == group)]
        return next((self.names[name] for name in others if name in self.names), None)


def prove(base: Path, adapter: Path, merged: Path, *, seed: int = 0) -> dict[str, Any]:
    """Compare rows of every parameter with what PEFT makes of base and adapter.

    Args:
        base: The base model's folder.
        adapter: The adapter's folder.
        merged: The merged model's folder.
        seed: Chooses the rows.

    Returns:
        `max_abs_error`, the largest difference, and `compared`, the number of parameters changed.

    Raises:
        DataLoss: The merged model is not base plus adapter, or nothing could be compared.
        FailedPrecondition: PEFT finds another set of tensors than the adapter has.
        InvalidInput: Transformers knows no such model, or a file is broken.
    """
    before, after = Model(base), Model(merged)
    updates = updates_of(base, adapter)
    random = torch.Generator().manual_seed(seed)
    largest, compared, seen = 0.0, 0, set[str]()
    for parameter in before.parameters:
        old, new = before.tensor_of(parameter), after.tensor_of(parameter)
        update = updates.pop(parameter, None)
        if old is None and update is None:
            continue  # not in the files under a name of its own; its tensors are compared below
        if old is None or new is None:
            raise _wrong(merged, f"{parameter} is missing")
        seen |= {old, new}
        shape = before.files.shape(old)
        if after.files.shape(new) != shape:
            raise _wrong(merged, f"{new} has another shape than in the base")
        for start, end in pieces(shape, random):
            was, is_now = before.files.rows(old, start, end), after.files.rows(new, start, end)
            if update is None:
                if not _same(was, is_now):
                    raise _wrong(merged, f"{new} differs from the base's, and the adapter leaves {parameter}")
                continue
            largest = max(largest, _compare(merged, new, is_now, *update(was.float(), start, end)))
        compared += update is not None
    if updates:
        raise _wrong(merged, f"the adapter changes {sorted(updates)[0]}, which nothing was compared with")
    _compare_rest(before, after, seen, random)
    if not compared:
        raise _wrong(merged, "the adapter changes nothing, so nothing could be compared")
    return {"max_abs_error": largest, "compared": compared}


def require_fit(base: Path, adapter: Path) -> None:
    """Refuse an adapter that lacks tensors that PEFT gives it on this base, or has others; no weight is read.

    Args:
        base: The base model's folder.
        adapter: The adapter's folder.

    Raises:
        FailedPrecondition: PEFT finds another set of tensors than the adapter has.
        InvalidInput: Transformers knows no such model, or a file is broken.
    """
    _adapted(base, adapter)


def _adapted(base: Path, adapter: Path) -> tuple[PeftModel, Files]:
    """Return a base without weights with PEFT's layers in it, and the adapter's tensors, which are theirs."""
    config = LoraConfig.from_pretrained(str(adapter))
    config.inference_mode, config.init_lora_weights = True, True  # how they start is without effect here
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")  # fan_in_fan_out corrected, and the like: that is what is wanted
        model = PeftModel(skeleton.build(base), config, adapter_name=_ADAPTER, low_cpu_mem_usage=True)
    path = adapter / ADAPTER_FILES[1]
    files = Files({tensor.name: path for tensor in read_shard(path).tensors})
    wanted = {
        name: tuple(tensor.shape)
        for name, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }
    found = {name: files.shape(name) for name in files.names()}
    if odd := sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)):
        raise FailedPrecondition(
            f"{path} is not what adapter_config.json makes of this base: {odd[0]} is "
            f"{found.get(odd[0], 'missing')} there, and for PEFT {wanted.get(odd[0], 'no such tensor')}.",
            fix="Bring the adapter anew, whole, with its own adapter_config.json.",
            reason="ADAPTER_MISFIT",
        )
    return model, files


def updates_of(base: Path, adapter: Path) -> dict[str, Any]:
    """Return, by the parameter's name, how PEFT changes rows of it: (old, start, end) to (new, size)."""
    model, files = _adapted(base, adapter)
    updates: dict[str, Any] = {}
    for name, module in model.named_modules():
        parameter = name.removeprefix(_PEFT_PREFIX)
        if isinstance(module, LoraLayer):
            updates[f"{parameter}.weight"] = _low_rank(module, files, name)
        elif isinstance(module, ModulesToSaveWrapper):
            for inner, _ in module.modules_to_save[_ADAPTER].named_parameters():
                updates[f"{parameter}.{inner}"] = _whole(files, f"{name}.{inner}")
    return updates


def _low_rank(module: Any, files: Files, name: str) -> Any:
    down, up = module.lora_A[_ADAPTER], module.lora_B[_ADAPTER]
    empty = down.weight, up.weight

    def delta(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Let PEFT's own layer multiply and scale; afterwards it holds neither."""
        down.weight = torch.nn.Parameter(a, requires_grad=False)
        up.weight = torch.nn.Parameter(b, requires_grad=False)
        product: torch.Tensor = module.get_delta_weight(_ADAPTER)
        down.weight, up.weight = empty
        return product

    def update(old: torch.Tensor, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = files.slice(f"{name}.lora_A.weight"), files.slice(f"{name}.lora_B.weight")
        if module.fan_in_fan_out:  # rows of the stored weight are inputs then
            a, b = a[:, start:end].float(), b[:].float()
        else:
            a, b = a[:].float(), b[start:end].float()
        change, sizes = delta(a, b), delta(a.abs(), b.abs()).abs()
        if _ADAPTER not in module.lora_magnitude_vector:
            return old + change, old.abs() + sizes
        lengths = files.slice(f"{name}.lora_magnitude_vector")[start:end].float()
        now = module.lora_magnitude_vector[_ADAPTER].get_weight_norm(old, change, scaling=1)
        factors = (lengths / now)[:, None]
        return factors * (old + change), old.abs() + factors.abs() * (old.abs() + sizes)

    return update


def _whole(files: Files, name: str) -> Any:
    def update(_: torch.Tensor, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        new = files.rows(name, start, end).float()
        return new, torch.zeros_like(new)

    return update


def _compare(
    folder: Path, name: str, actual: torch.Tensor, expected: torch.Tensor, size: torch.Tensor
) -> float:
    """Return the largest difference; refuse what rounding the expected value to the type can't give."""
    slack = SLACK * size
    low, high = (expected - slack).to(actual.dtype), (expected + slack).to(actual.dtype)
    difference = float((actual.float() - expected).abs().max()) if actual.numel() else 0.0
    if not bool(((low <= actual) & (actual <= high)).all()):
        raise _wrong(folder, f"{name} is off by {difference:.3g} from what PEFT makes of base and adapter")
    return difference


def _compare_rest(before: Model, after: Model, seen: set[str], random: torch.Generator) -> None:
    """Compare what no parameter was compared by: the files must not differ in anything else."""
    for name in sorted(after.files.names() - seen - before.files.names()):
        raise _wrong(after.folder, f"{name} is neither in the base nor a parameter")
    for name in sorted(before.files.names() - seen):
        if name not in after.files or after.files.shape(name) != before.files.shape(name):
            raise _wrong(after.folder, f"{name} is missing or has another shape")
        for start, end in pieces(before.files.shape(name), random):
            if not _same(before.files.rows(name, start, end), after.files.rows(name, start, end)):
                raise _wrong(after.folder, f"{name} differs from the base's without a reason")
    for one, other in after.tied.items():
        names = [name for name in (one, other) if name in after.files]
        if len(names) == 2:  # both stored, and said to be one: readers would disagree on which counts
            for start, end in pieces(after.files.shape(one), random):
                if not _same(*(after.files.rows(name, start, end) for name in names)):
                    raise _wrong(after.folder, f"config.json ties {one} and {other}, which differ")


def pieces(shape: tuple[int, ...], random: torch.Generator) -> Iterator[tuple[int, int]]:
    """Yield first and last rows, and some between, at random."""
    rows = shape[0] if shape else 1
    if rows <= _PIECES * _PIECE_ROWS:
        yield 0, rows
        return
    starts = torch.randint(0, rows - _PIECE_ROWS + 1, (_PIECES - 2,), generator=random).tolist()
    for start in (0, *starts, rows - _PIECE_ROWS):
        yield start, start + _PIECE_ROWS


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Compare bytes: values that are no numbers equal themselves."""
    return one.dtype == other.dtype and torch.equal(
        one.contiguous().flatten().view(torch.uint8), other.contiguous().flatten().view(torch.uint8)
    )


def _wrong(folder: Path, why: str) -> DataLoss:
    return DataLoss(
        f"{folder} is not base plus adapter: {why}.",
        fix="Package again; if it happens again, this is a defect.",
        reason="MERGE_WRONG",
    )
