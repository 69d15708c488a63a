# The decode node. Built from the repository's root: docker build -f deploy/decode.Dockerfile .
FROM python:3.11-slim-bookworm AS build
RUN apt-get update -qq \
 && apt-get install -y -qq --no-install-recommends g++ python3-dev \
 && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/fluxion
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_CONSTRAINT=/src/constraints.txt
# Where torch comes from beside PyPI: https://download.pytorch.org/whl/cpu has builds without CUDA.
ARG TORCH_INDEX=""
# "cuda" adds Triton.
ARG EXTRAS=""
WORKDIR /src
COPY constraints.txt pyproject.toml ./
# Dependencies first: a layer that lasts until they change.
RUN PIP_EXTRA_INDEX_URL=$TORCH_INDEX /opt/fluxion/bin/python -c "import sys, tomllib; \
project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
extras = [e for name in '$EXTRAS'.split(',') if name for e in project['optional-dependencies'][name]]; \
print(*project['dependencies'], *extras, sep='\n')" > /tmp/requirements.txt \
 && PIP_EXTRA_INDEX_URL=$TORCH_INDEX /opt/fluxion/bin/pip install -q -r /tmp/requirements.txt
COPY . .
RUN /opt/fluxion/bin/pip install -q --no-deps . \
 && rm -rf /opt/fluxion/lib/python3*/site-packages/torch/include \
 && find /opt/fluxion -name __pycache__ -prune -exec rm -rf {} +

FROM python:3.11-slim-bookworm
RUN useradd --system --uid 10001 --home-dir /nonexistent fluxion \
 && mkdir /models && chown fluxion /models
COPY --from=build /opt/fluxion /opt/fluxion
ENV PATH=/opt/fluxion/bin:$PATH PYTHONDONTWRITEBYTECODE=1
USER fluxion
VOLUME /models
EXPOSE 7070 9464
STOPSIGNAL SIGTERM
# Loading a large model takes minutes; until then the node is alive and not ready.
HEALTHCHECK --interval=15s --timeout=10s --start-period=10m CMD ["fluxion", "health", "127.0.0.1:7070"]
ENTRYPOINT ["python", "-m", "services.decode"]
