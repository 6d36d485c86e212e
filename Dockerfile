# Two images on one Triton release: `engines` builds TensorRT plans on the GPU that will run them, `serve` serves them.
# A plan belongs to the TensorRT that built it, so both have that release's own libraries. docs/deployment.md says how.
ARG TRITON_RELEASE=26.11

FROM nvcr.io/nvidia/tritonserver:${TRITON_RELEASE}-py3 AS triton

# what needs a compiler or the sources; only the two folders in /opt leave this stage
FROM triton AS packages
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/mubic

# pycuda is compiled against the image's CUDA and linked with its stub of the driver; only the driver's part of CUDA is
# used, so CURAND is left out
RUN for file in include/cuda.h include/cudaProfiler.h lib64/stubs/libcuda.so; do file="/usr/local/cuda/$file"; \
    test -f "$file" || { echo "the Triton image has no $file: see docs/deployment.md" >&2; exit 1; }; done
RUN printf '%s\n' 'CUDA_ROOT = "/usr/local/cuda"' 'CUDA_ENABLE_CURAND = False' > /etc/aksetup-defaults.py
COPY requirements.txt ./
RUN /opt/mubic/bin/pip install --constraint requirements.txt \
    numpy onnxruntime protobuf pycuda==2026.1 rich 'tritonclient[grpc]'

# TensorRT's Python bindings of the very version that the image has; --no-deps leaves out another copy of its libraries.
# The .* because some came a second time, and those of 10.14.1.48 only so: as 10.14.1.48.post1
RUN found="$(dpkg-query --show --showformat='${Version}\n' 'libnvinfer[0-9]*' | grep -m 1 .)" \
    || { echo "the Triton image has no TensorRT (libnvinfer): see docs/deployment.md" >&2; exit 1; } \
    && version="${found%%-*}" \
    && cuda="${found##*+cuda}" \
    && name="tensorrt-cu${cuda%%.*}" \
    && /opt/mubic/bin/pip install --no-deps "${name}==${version}.*" "${name}-bindings==${version}.*"

COPY pyproject.toml README.md ./
COPY export export
COPY triton_models triton_models
COPY mubic_deploy mubic_deploy
RUN /opt/mubic/bin/pip wheel --no-deps --wheel-dir /wheels . \
    && /opt/mubic/bin/pip install --no-deps /wheels/mubic_deploy-*.whl \
    && /opt/mubic/bin/pip install --no-deps --target /opt/models --constraint requirements.txt \
    av numpy /wheels/mubic_deploy-*.whl


FROM triton AS engines
COPY --from=packages /opt/mubic /opt/mubic
ENV PATH=/opt/mubic/bin:${PATH}
# what can be imported without a GPU; and a folder that the user below may write to, which a new volume takes over
RUN python3 -c "import mubic_deploy.commands, mubic_deploy.parity, mubic_deploy.triton.repository, onnxruntime" \
    && install -d -o 1000 -g 1000 /srv/mubic
# triton-server, to whom NVIDIA gave what is in /opt/tritonserver
USER 1000:1000


FROM triton AS serve
COPY --from=packages /opt/models /opt/models
# the Python backend runs its models with the image's Python, which looks here first
ENV PYTHONPATH=/opt/models
RUN python3 -c "import mubic_deploy.pipeline, mubic_deploy.live.streams, mubic_deploy.triton.health, mubic_deploy.triton.parameters" \
    && install -d -o 1000 -g 1000 /srv/mubic
USER 1000:1000
EXPOSE 8000 8001 8002
