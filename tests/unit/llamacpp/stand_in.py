"""A source of small real programs in place of llama.cpp's, compiled by the real build.

llama-quantize copies; llama-server listens and gives the self-test's answer. It crashes for real, by the
signal that `CRASHES` names, or already at `--version` by the one that `STARTS_WITH` names.
"""

from __future__ import annotations

from pathlib import Path

from web4lora_llamacpp.source import source_folder
from web4lora_llamacpp.tools import TARGETS, cache_root

CMAKE = """cmake_minimum_required(VERSION 3.21)
project(llama CXX)
set(CMAKE_RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
foreach(name %s)
  add_executable(${name} main.cpp)
  target_compile_definitions(${name} PRIVATE NATIVE_${GGML_NATIVE} AVX2_${GGML_AVX2})
endforeach()
""" % " ".join(TARGETS)  # noqa: UP031 - the text has braces
MAIN = r"""
#include <arpa/inet.h>
#include <sys/socket.h>
#include <unistd.h>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <string>
#ifndef CRASHES
#define CRASHES 0
#endif
#ifndef STARTS_WITH
#define STARTS_WITH 0
#endif
#ifndef ANSWER
#define ANSWER "340,341,342,343,344,345,346,347"
#endif

static void answer(int from, const std::string & body) {
    std::string text = "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: "
        + std::to_string(body.size()) + "\r\n\r\n" + body;
    if (write(from, text.data(), text.size()) < 0) std::perror("write");
}

int main(int count, char ** words) {
    std::string me = words[0];
    if (STARTS_WITH) std::raise(STARTS_WITH);
    if (count > 1 && !std::strcmp(words[1], "--version")) {
        return std::puts("version: 9.8.7 (build 1, commit abc1234)") < 0;
    }
    if (me.find("llama-quantize") != std::string::npos) {
        std::ifstream from(words[count - 3], std::ios::binary);
        std::ofstream(words[count - 2], std::ios::binary) << from.rdbuf();
        return 0;
    }
    if (CRASHES) std::raise(CRASHES);
    int server = socket(AF_INET, SOCK_STREAM, 0);
    sockaddr_in place{};
    place.sin_family = AF_INET;
    place.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t size = sizeof place;
    bind(server, (sockaddr *) &place, size);
    listen(server, 8);
    getsockname(server, (sockaddr *) &place, &size);
    std::printf("listening on http://127.0.0.1:%d\n", ntohs(place.sin_port));
    std::fflush(stdout);
    for (;;) {
        int from = accept(server, nullptr, nullptr);
        char asked[65536];
        ssize_t got = read(from, asked, sizeof asked - 1);
        asked[got > 0 ? got : 0] = 0;
        answer(from, std::strstr(asked, "POST") ? "{\"tokens\": [" ANSWER "]}" : "{}");
        close(from);
    }
}
"""


def put_source(cache: Path, main: str = MAIN) -> None:
    """Put a source into a new cache, where the real one would lie once unpacked."""
    source = source_folder(cache_root(cache))
    source.mkdir(parents=True)
    (source / "CMakeLists.txt").write_text(CMAKE)
    (source / "main.cpp").write_text(main)
    (source / "convert_hf_to_gguf.py").write_text("")
