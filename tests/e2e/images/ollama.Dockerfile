# The real Ollama, built from its pinned Go module by tests/servers/build.py, for where no image can be pulled. The
# build context is the folder of that program. Ollama runs models with the llama-server beside it: ours.
# hadolint ignore=DL3007
FROM web4lora-deployer:latest
LABEL org.opencontainers.image.title="web4lora-test-ollama"
USER 0
COPY ollama /usr/local/bin/ollama
RUN ln -s /opt/llama.cpp/bin /usr/local/lib/ollama
USER 10001:10001
ENTRYPOINT ["ollama"]
CMD ["serve"]
