# llama.cpp as compiled on this machine, laid out by docker/copy_llama_cpp.py in the build context.
FROM scratch
COPY . /opt/llama.cpp
