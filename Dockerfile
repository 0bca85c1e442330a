# docker build -t fastdpo .                     for NVIDIA GPUs
# docker build -t fastdpo --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu .     for CPUs
#
# Python's image, and none of nvidia/cuda: torch's wheels bring their CUDA libraries, which would then be there
# twice, and the driver's come from the host (nvidia-container-toolkit). Triton compiles its launchers when they
# are first used: with gcc, and Python's headers, which this image has.
FROM python:3.12-slim

RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

# torch alone: its layer stays where only the sources change
ARG TORCH_INDEX=https://pypi.org/simple
COPY constraints.txt /src/
RUN pip install --no-cache-dir --constraint /src/constraints.txt torch --index-url "$TORCH_INDEX"

COPY pyproject.toml setup.cfg README.md LICENSE /src/
COPY fastdpo /src/fastdpo
COPY kernels /src/kernels
RUN pip install --no-cache-dir --constraint /src/constraints.txt "/src[peft,quant]"

# All caches are under this home: the hub's files, the reference's log-probs, compiled kernels. Both folders are
# for whoever runs it, as with `docker run --user`.
RUN useradd --create-home --home-dir /cache fastdpo && mkdir /work && chmod 1777 /cache /work
ENV HOME=/cache NVIDIA_DRIVER_CAPABILITIES=compute,utility
VOLUME /cache
WORKDIR /work
USER fastdpo
ENTRYPOINT ["fastdpo"]
