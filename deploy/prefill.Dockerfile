# The prefill node. Built from the repository's root: docker build -f deploy/prefill.Dockerfile .
FROM python:3.11-slim-bookworm AS build
RUN apt-get update -qq \
 && apt-get install -y -qq --no-install-recommends g++ python3-dev \
 && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/fluxion
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_CONSTRAINT=/src/constraints.txt
# Where torch alone comes from: https://download.pytorch.org/whl/cpu has builds without CUDA. Empty: from where all else does.
ARG TORCH_INDEX=""
# "hub" fetches models from the Hugging Face hub, "cuda" adds Triton and NVML: "cuda,hub" for both.
ARG EXTRAS="hub"
WORKDIR /src
COPY constraints.txt pyproject.toml ./
# Dependencies first: a layer that lasts until they change. Of torch only what runs, a quarter less;
# `import torch` wants torch_shm_manager to be there.
RUN if [ -n "$TORCH_INDEX" ]; then /opt/fluxion/bin/pip install -q --no-compile --no-deps --index-url "$TORCH_INDEX" torch; fi \
 && /opt/fluxion/bin/python -c "import sys, tomllib; \
project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
extras = [e for name in '$EXTRAS'.split(',') if name for e in project['optional-dependencies'][name]]; \
print(*project['dependencies'], *extras, sep='\n')" > /tmp/requirements.txt \
 && /opt/fluxion/bin/pip install -q --no-compile -r /tmp/requirements.txt \
 && cd /opt/fluxion/lib/python3.11/site-packages/torch \
 && rm -rf include test lib/*_test.so \
 && find bin -type f ! -name torch_shm_manager -delete \
 && strip --strip-unneeded lib/libtorch_cpu.so lib/libtorch_python.so
COPY . .
# Bytecode of what the command imports: a health check costs half as much. torch's would be 60 MB.
RUN /opt/fluxion/bin/pip install -q --no-compile --no-deps . \
 && /opt/fluxion/bin/python -m compileall -q -x '/(torch|torchgen|sympy|mpmath|networkx|numpy|pip|setuptools|pygments)/' /opt/fluxion/lib

FROM python:3.11-slim-bookworm
ARG EXTRAS="hub"
# Triton has the system's compiler build its launchers, when a kernel is first used.
RUN case ",$EXTRAS," in *,cuda,*) \
      apt-get update -qq && apt-get install -y -qq --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/* ;; \
    esac \
 && useradd --system --uid 10001 --home-dir /nonexistent fluxion \
 && mkdir /models && chown fluxion /models
COPY --from=build /opt/fluxion /opt/fluxion
ENV PATH=/opt/fluxion/bin:$PATH PYTHONDONTWRITEBYTECODE=1 TRITON_CACHE_DIR=/tmp/triton
USER fluxion
VOLUME /models
EXPOSE 7070 7072 9464
STOPSIGNAL SIGTERM
# Loading a large model takes minutes; until then the node is alive and not ready. A busy machine may take a check long.
HEALTHCHECK --interval=15s --timeout=30s --start-period=10m CMD ["fluxion", "health", "127.0.0.1:7070"]
ENTRYPOINT ["python", "-m", "services.prefill"]
