"""Moves the pin of llama.cpp: `python libs/llamacpp/update_pin.py VERSION`, see `make llama-cpp-update`.

Fetches the sdist of llama-cpp-python, tells which architectures and pre-tokenizers its converter knows more
or less than the pinned one, and writes version, digest and commit into `source.py`. Then it builds both and
tells which quantizations of one model give other bytes. The gates are tests, which `make` runs behind it.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

SOURCE = Path(__file__).parent / "src" / "web4lora_llamacpp" / "source.py"
QUANTIZATIONS = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "IQ4_XS")

_NAME = "llama-cpp-python"
_VENDOR = PurePosixPath("vendor", "llama.cpp")
_REGISTERED = re.compile(r"@ModelBase\.register\(([^)]*)\)")
_PRE_TOKENIZER = re.compile(r'^\s+res = "([^"]+)"$', re.MULTILINE)
_COMMIT = re.compile(r"llama\.cpp[@/](?:commit/)?([0-9a-f]{7,40})")
_FIELD = r'(SDIST = Sdist\((?:.|\n)*?\b{}=")[^"]*(")'


@dataclass(frozen=True)
class Release:
    """What an sdist says of the llama.cpp in it.

    Attributes:
        version: The sdist's.
        sha256: Of the archive.
        commit: Of llama.cpp, 7 digits.
        architectures: Names in config.json that the converter knows.
        pre_tokenizers: Pre-tokenizers that it knows.
    """

    version: str
    sha256: str
    commit: str
    architectures: frozenset[str]
    pre_tokenizers: frozenset[str]


def fetch(version: str, folder: Path) -> Path:
    """Fetch an sdist with pip, from the index that pip is set to."""
    options = ["--quiet", "--no-input", "--no-deps", f"--no-binary={_NAME}", "--dest", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "download", *options, f"{_NAME}=={version}"], check=True)
    return next(folder.glob("*.tar.gz"))


def read_release(archive: Path, version: str) -> Release:
    """Read what an sdist says of its llama.cpp; nothing of it is run.

    Raises:
        SystemExit: Its changelog names no commit for this version.
    """
    texts, changelog = [], ""
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            path = PurePosixPath(*PurePosixPath(member.name).parts[1:])
            inside = path.relative_to(_VENDOR) if path.is_relative_to(_VENDOR) else None
            wanted = inside and (inside.name == "convert_hf_to_gguf.py" or inside.parts[0] == "conversion")
            file = tar.extractfile(member) if wanted or path.name == "CHANGELOG.md" else None
            if file is None:
                continue
            text = file.read().decode("utf-8", errors="replace")
            if wanted:
                texts.append(text)
            elif len(path.parts) == 1:
                changelog = text
    section = re.split(r"^## ", changelog.partition(f"## [{version}]")[2], maxsplit=1, flags=re.MULTILINE)[0]
    commit = _COMMIT.search(section)
    if commit is None:
        raise SystemExit(f"{archive.name}: its changelog names no commit of llama.cpp for {version}.")
    names = {
        name for text in texts for each in _REGISTERED.findall(text) for name in re.findall(r'"(\w+)"', each)
    }
    return Release(
        version,
        hashlib.sha256(archive.read_bytes()).hexdigest(),
        commit[1][:7],
        frozenset(names),
        frozenset(name for text in texts for name in _PRE_TOKENIZER.findall(text)),
    )


def differences(old: Release, new: Release) -> list[str]:
    """Return what the converter knows more or less, a line each."""
    lines = [f"{old.version} ({old.commit}) → {new.version} ({new.commit})"]
    for title, before, after in (
        ("architectures", old.architectures, new.architectures),
        ("pre-tokenizers", old.pre_tokenizers, new.pre_tokenizers),
    ):
        lines.append(f"{title}: {len(before)} → {len(after)}")
        lines += [f"  + {name}" for name in sorted(after - before)]
        lines += [f"  - {name}" for name in sorted(before - after)]
    return lines


def pinned(text: str, release: Release) -> str:
    """Return source.py's text with another pin.

    Raises:
        SystemExit: The pin is not where it was.
    """
    for field in ("version", "sha256", "commit"):
        value = getattr(release, field)
        text, count = re.subn(_FIELD.format(field), rf"\g<1>{value}\g<2>", text, count=1)
        if not count:
            raise SystemExit(f"source.py has no {field} in its SDIST.")
    return text


def quantized() -> dict[str, str]:
    """Return the digest of one model's quantizations, by the pinned llama.cpp, built when it is not yet."""
    from web4lora_chassis.settings import Settings, load
    from web4lora_llamacpp import ensure_built
    from web4lora_llamacpp.tiny_model import write_tiny_model

    llama = ensure_built(load(Settings).cache, lambda progress: print(progress.message, file=sys.stderr))
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        model, target = Path(folder) / "model.gguf", Path(folder) / "quantized.gguf"
        write_tiny_model(model)
        for name in QUANTIZATIONS:
            subprocess.run([llama.quantize, model, target, name], check=True, capture_output=True)
            found[name] = hashlib.sha256(target.read_bytes()).hexdigest()
    return found


def _in_a_process_of_its_own() -> Mapping[str, str]:
    """Return the same by the pin as it stands in the file now."""
    command = [sys.executable, __file__, "--quantize"]
    found: dict[str, str] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return found


def main(version: str) -> None:
    """Move the pin and tell what changed."""
    from web4lora_llamacpp.source import SDIST

    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        old = read_release(fetch(SDIST.version, Path(one)), SDIST.version)
        new = read_release(fetch(version, Path(other)), version)
    print("\n".join(differences(old, new)), flush=True)
    before = _in_a_process_of_its_own()
    SOURCE.write_text(pinned(SOURCE.read_text(encoding="utf-8"), new), encoding="utf-8")
    after = _in_a_process_of_its_own()
    for name in QUANTIZATIONS:
        print(f"{name}: {'the same bytes' if before[name] == after[name] else 'OTHER BYTES'}")


if __name__ == "__main__":
    if sys.argv[1:] == ["--quantize"]:
        sys.stdout.write(json.dumps(quantized()))
    elif len(sys.argv) == 2:
        main(sys.argv[1])
    else:
        sys.exit("VERSION is missing: make llama-cpp-update VERSION=0.3.40")
