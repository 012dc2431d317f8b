# ssl-kit with torch for CPUs:  docker build --tag ssl-kit .
#   docker run --rm -v "$PWD:/work" ssl-kit pretrain photos
# For NVIDIA GPUs: docker build --build-arg TORCH=cu130 ..., then docker run --gpus all ...
FROM python:3.12-slim
ARG TORCH=cpu
COPY . /source
RUN pip install --no-cache-dir uv && \
    uv pip install --system --no-cache --torch-backend "$TORCH" '/source[demo,onnx]' && \
    rm -rf /source
# of whoever runs it with --user: caches and settings go where anybody may write
ENV HOME=/tmp
WORKDIR /work
ENTRYPOINT ["ssl-kit"]
