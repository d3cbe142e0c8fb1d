# MinIO as tests/servers/build.py has compiled it, from the very pin that docker/minio.Dockerfile compiles. The build
# context is the folder of that program.
FROM debian:bookworm-slim
COPY minio /usr/local/bin/minio
ENTRYPOINT ["minio"]
