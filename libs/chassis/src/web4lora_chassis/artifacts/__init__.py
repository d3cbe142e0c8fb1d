"""Content-addressed, immutable artifacts: what the services hand to each other.

A `Manifest` lists an artifact's files by path, SHA-256 and size, and what it was made from. An
`ArtifactStore` keeps artifacts in a `Backend`: a folder or an S3 bucket, chosen by `open_store`.
The manifest is written last, so nobody ever sees half an artifact; files are verified as they are read.
"""

from web4lora_chassis.artifacts.backend import Backend
from web4lora_chassis.artifacts.manifest import KINDS, ArtifactRef, FileEntry, Manifest, hash_file
from web4lora_chassis.artifacts.open import open_store
from web4lora_chassis.artifacts.store import ArtifactStore

__all__ = [
    "KINDS",
    "ArtifactRef",
    "ArtifactStore",
    "Backend",
    "FileEntry",
    "Manifest",
    "hash_file",
    "open_store",
]
