"""Push a deployment to an OCI registry: the model that Docker Model Runner is given, by the same digest."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from web4lora_chassis.errors import FailedPrecondition
from web4lora_chassis.jobs.byte_progress import byte_progress
from web4lora_chassis.model_files.gguf import read_gguf

from web4lora_deployer.records.deployments import Deployments
from web4lora_deployer.registry import Credentials, Registry, parse_reference
from web4lora_deployer.registry.oci import MANIFEST_TYPE, build
from web4lora_deployer.runtimes.base import Report
from web4lora_deployer.settings import DeployerSettings


@dataclass(frozen=True)
class PushRequest:
    """What to push, and where to.

    Attributes:
        deployment: A deployment's id or name.
        reference: `registry/repository[:tag]`; the tag of the deployment's id when it has none.
        credentials: Who we are at the registry.
        plain_http: Speak without TLS also to a registry beyond this machine.
    """

    deployment: str
    reference: str
    credentials: Credentials = field(default_factory=Credentials)
    plain_http: bool = False


@dataclass(frozen=True)
class PushOutcome:
    """What was pushed.

    Attributes:
        reference: Where it is, with its tag.
        digest: Of its manifest: "sha256:…".
        size_bytes: Of all of it.
        sent_bytes: What had to be sent for it; 0 when all of it was there.
    """

    reference: str
    digest: str
    size_bytes: int
    sent_bytes: int


def push(request: PushRequest, settings: DeployerSettings, report: Report) -> PushOutcome:
    """Push a deployment's model. What the registry has is not sent again; an interrupted push goes on.

    Args:
        request: What to push, and where to.
        settings: Where the records are.
        report: Takes progress.

    Raises:
        InvalidInput: The reference has another form, or the registry takes no such name.
        FailedPrecondition: The deployment has adapters.
        NotFound: No such deployment.
        Unauthenticated: The registry does not let us push there.
        Unavailable: It is out of reach, or busy.
        ResourceExhausted: It is full.
        DataLoss: Bytes are not what their digest says.
    """
    place = parse_reference(request.reference)
    deployments = Deployments(settings.deployer_home)
    record = deployments.find(request.deployment)
    if record.adapters:
        raise FailedPrecondition(
            f"{record.id} has adapters, which an OCI model can't hold.",
            fix="Push the merged model: `web4lora run` deploys it.",
            reason="HAS_ADAPTERS",
        )
    place = place if place.tag else replace(place, tag=record.id.rpartition(":")[2])
    file = deployments.path(record)
    model = build(record, file, read_gguf(file))
    blobs = (*model.layers, model.config)
    total = sum(blob.size_bytes for blob in blobs)
    advance = byte_progress(report, "push", total, str(place))

    unfinished = settings.deployer_home / "pushes"
    with Registry(place, request.credentials, unfinished, plain_http=request.plain_http) as registry:
        if registry.manifest_digest(place.tag, MANIFEST_TYPE) == model.digest:
            advance(total)
        else:
            for blob in blobs:
                registry.put_blob(blob, advance)
            registry.put_manifest(place.tag, model.manifest, MANIFEST_TYPE)
        return PushOutcome(str(place), model.digest, total, registry.sent_bytes)
