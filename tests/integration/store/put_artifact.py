"""Puts one file into a store as its own process: `python put_artifact.py ENDPOINT BUCKET FILE`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from web4lora_chassis.artifacts import ArtifactStore
from web4lora_chassis.artifacts.s3 import S3Backend

endpoint, bucket, file = sys.argv[1:]
backend = S3Backend(
    endpoint, bucket, os.environ["KEY"], os.environ["SECRET"], "us-east-1", False, part_bytes=5 << 20
)
sys.stdin.readline()  # the test starts all at once
ref = ArtifactStore(backend).put("gguf", "demo", {"model.gguf": Path(file)}, created_by=str(os.getpid()))
sys.stdout.write(ref.digest)
