"""What is in a store, newest first, without reading every manifest for every look.

Manifests are immutable: one that was read is read again only when it was stored anew. What a listing needs of
each is kept, a few hundred bytes; whole manifests only of the last ones that were shown.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from web4lora_chassis.artifacts.backend import Stored
from web4lora_chassis.artifacts.manifest import ArtifactRef, Manifest
from web4lora_chassis.artifacts.store import ArtifactStore

_WHOLE = 500


@dataclass(frozen=True)
class Indexed:
    """An artifact as a listing needs it.

    Attributes:
        stored: Where its manifest is, and when it was stored or touched last.
        ref: Its name.
        created_at: When it was first stored, as seconds since 1970.
        inputs: What it was made from.
    """

    stored: Stored
    ref: ArtifactRef
    created_at: float
    inputs: tuple[ArtifactRef, ...]

    @property
    def place(self) -> tuple[float, str]:
        """Its place in a listing, which is the same in every listing."""
        return self.created_at, self.ref.digest


class ManifestIndex:
    """Knows a store's artifacts. Its calls block, and may come from several threads."""

    def __init__(self, store: ArtifactStore) -> None:
        self._store = store
        self._known: dict[str, tuple[Stored, Indexed | None]] = {}
        self._whole: OrderedDict[Stored, Manifest] = OrderedDict()
        self._lock = threading.Lock()

    def newest(self, kind: str = "", name: str = "") -> list[Indexed]:
        """Return the artifacts of a kind and a name, newest first; empty means any.

        Raises:
            Unavailable: The store is out of reach.
        """
        with self._lock:
            found = list(self._store.manifests(kind, name))
            for stored in found:
                if stored.key not in self._known or self._known[stored.key][0] != stored:
                    self._known[stored.key] = (stored, self._indexed(stored))
            if not (kind or name):
                here = {stored.key for stored in found}
                self._known = {key: known for key, known in self._known.items() if key in here}
            rows = [row for stored in found if (row := self._known[stored.key][1]) is not None]
        return sorted(rows, key=lambda row: row.place, reverse=True)

    def manifests(self, rows: Sequence[Indexed]) -> list[Manifest]:
        """Return the manifests of listed artifacts; of those that are still there."""
        found = (self._manifest(row.stored) for row in rows)
        return [manifest for manifest in found if manifest is not None]

    def _indexed(self, stored: Stored) -> Indexed | None:
        manifest = self._store.listed(stored)  # None for what is damaged: said once, when it is first seen
        if manifest is None:
            return None
        return Indexed(stored, manifest.ref, manifest.created_at, manifest.inputs)

    def _manifest(self, stored: Stored) -> Manifest | None:
        with self._lock:
            if stored in self._whole:
                self._whole.move_to_end(stored)
                return self._whole[stored]
        manifest = self._store.listed(stored)
        if manifest is not None:
            with self._lock:
                self._whole[stored] = manifest
                while len(self._whole) > _WHOLE:
                    self._whole.popitem(last=False)
        return manifest
