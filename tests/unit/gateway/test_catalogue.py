"""Listings of artifacts: what they read, that their pages hold, and that many at once share one look."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from web4.lora.v1 import artifacts_pb2
from web4lora_chassis.artifacts import ArtifactStore
from web4lora_chassis.artifacts.folder import FolderBackend
from web4lora_chassis.artifacts.index import ManifestIndex
from web4lora_chassis.errors import InvalidInput
from web4lora_chassis.settings import Settings
from web4lora_gateway.catalogue import ArtifactService

Request = artifacts_pb2.ListArtifactsRequest


class CountingBackend(FolderBackend):
    """A folder that counts how often something in it is read and listed."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.reads = 0
        self.lists = 0

    def read(self, key: str, limit_bytes: int) -> bytes:
        self.reads += 1
        return super().read(key, limit_bytes)

    def stored(self, prefix: str, name: str = ""):
        self.lists += prefix.startswith("artifacts/gguf/")
        return super().stored(prefix, name)


class Catalogue:
    """A store with artifacts, a second apart, and the service over it."""

    def __init__(self, root: Path, count: int) -> None:
        self.backend = CountingBackend(root / "store")
        self.store = ArtifactStore(self.backend)
        self.root = root
        self.refs = [self.add(number) for number in range(count)]
        self.backend.reads = self.backend.lists = 0
        self.service = ArtifactService(self.store, Settings(home=root), ManifestIndex(self.store), None)

    def add(self, number: int):
        source = self.root / "file"
        source.write_text(str(number))
        ref = self.store.put("gguf", "demo", {"file": source}, link=False)
        place = self.root / "store" / ref.prefix / "manifest.json"
        place.write_text(json.dumps({**json.loads(place.read_text()), "created_at": 1000.0 + number}))
        return ref

    async def page(self, token: str = "", size: int = 10) -> artifacts_pb2.ListArtifactsResponse:
        return await self.service.ListArtifacts(Request(page_size=size, page_token=token), None)


def digests(answer: artifacts_pb2.ListArtifactsResponse) -> list[str]:
    return [artifact.ref.digest for artifact in answer.artifacts]


def test_a_page_reads_only_what_it_shows_and_nothing_that_was_read_before(tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path, 30)

    async def main() -> None:
        await catalogue.page()
        catalogue.backend.reads = 0
        page = await catalogue.page()
        assert catalogue.backend.reads == 0
        await catalogue.page(page.next_page_token)
        assert catalogue.backend.reads == 10
        new = catalogue.add(99)
        assert digests(await catalogue.page())[0] == new.digest
        catalogue.backend.reads = 0
        assert (await catalogue.page()).artifacts[0].files[0].size_bytes == 2
        assert catalogue.backend.reads == 0

    asyncio.run(main())


def test_pages_hold_while_artifacts_come_and_go(tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path, 25)

    async def main() -> None:
        first = await catalogue.page()
        last_shown = catalogue.refs[15]
        assert digests(first)[-1] == last_shown.digest
        catalogue.store.delete(last_shown)
        catalogue.store.delete(catalogue.refs[14])
        catalogue.add(99)
        second = await catalogue.page(first.next_page_token)
        assert digests(second) == [ref.digest for ref in reversed(catalogue.refs[4:14])]
        third = await catalogue.page(second.next_page_token)
        assert digests(third) == [ref.digest for ref in reversed(catalogue.refs[:4])]
        assert third.next_page_token == ""

    asyncio.run(main())


def test_many_listings_at_once_share_a_look_and_see_all_that_was_there_before(tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path, 20)

    async def main() -> None:
        answers = await asyncio.gather(*(catalogue.page() for _ in range(40)))
        assert len({tuple(digests(answer)) for answer in answers}) == 1
        assert catalogue.backend.lists <= 2
        new = catalogue.add(99)
        assert digests(await catalogue.page())[0] == new.digest

    asyncio.run(main())


@pytest.mark.parametrize("token", ["nothing", "1.0", "x@" + "0" * 64, "0" * 64])
def test_a_token_of_nobody_is_refused(tmp_path: Path, token: str) -> None:
    with pytest.raises(InvalidInput, match="page_token"):
        asyncio.run(Catalogue(tmp_path, 1).page(token))


def test_a_kind_of_nobody_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="99 is not an artifact kind"):
        asyncio.run(Catalogue(tmp_path, 1).service.ListArtifacts(Request(kind=99), None))


def test_an_artifact_that_is_stored_again_keeps_its_place(tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path, 3)

    async def main() -> None:
        before = digests(await catalogue.page())
        catalogue.store.touch(catalogue.refs[0])
        assert digests(await catalogue.page()) == before

    asyncio.run(main())
