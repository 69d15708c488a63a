# One verb, one line each. `make demo` and `make test` need nothing but Python 3.11 or 3.12, a C++17
# compiler and a package index; everything is installed into .venv.

VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# A comma of its own would end an argument of `patiently`.
FOR_TESTS := .[test,docs]
NATIVE := $(shell find fluxion_core/kernels/native -type f 2>/dev/null)
NATIVE_SOURCES := $(filter %.h %.cpp %.inl,$(NATIVE)) tests/fluxion_core/pool/task_pool_harness.cpp

# What is silent for long, with a dot a second: $(call patiently,WHAT,COMMAND)
define patiently
@printf '%s' '$(1)' >&2; (while sleep 1 && kill -0 $$$$; do printf . >&2; done) & dots=$$!; \
  $(2); status=$$?; kill $$dots; echo >&2; exit $$status
endef

.PHONY: demo test load lint format bench asan tsan fuzz faults protos dashboards docs picture compose-test native wheel clean

demo: $(VENV)/.installed  ## ask a question about a 7,000-token document, through two processes
	$(BIN)/fluxion demo

test: $(VENV)/.tested  ## the whole test suite, two files at a time
	$(BIN)/python -m pytest -n 2

load: $(VENV)/.tested  ## what takes many minutes: 64 streams at a time, 8,000 tokens by steps alone
	$(BIN)/python -m pytest -m load

lint: $(VENV)/.tested  ## formatting, lint, types, imports; stubs, dashboards and picture fresh; the site
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run --Werror $(NATIVE_SOURCES)
	$(BIN)/mypy
	$(BIN)/mypy examples
	$(BIN)/lint-imports
	$(BIN)/python protos/regenerate.py --check
	$(BIN)/python -m fluxion_core.planning.generate --check
	$(BIN)/python deploy/grafana/generate.py --check
	$(BIN)/python docs/architecture/packages.py --check
	$(BIN)/python docs/architecture/flow.py --check
	$(BIN)/python docs/generate.py --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

format: $(VENV)/.tested
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(NATIVE_SOURCES)

bench: $(VENV)/.installed  ## figures of this machine
	$(BIN)/fluxion bench handoff
	$(BIN)/fluxion bench kernels
	$(BIN)/fluxion bench decode-step
	$(BIN)/python -m fluxion_core.lab.benchmark.sampling

asan: $(VENV)/.tested  ## the kernels' tests under AddressSanitizer
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --disable-pip-version-check -q cmake ninja nanobind
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/cmake -S fluxion_core/kernels/native -B build/asan -G Ninja \
	  -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python -DCMAKE_CXX_FLAGS="-fsanitize=address -fno-omit-frame-pointer -g1" >/dev/null
	$(BIN)/cmake --build build/asan
	FLUXION_NATIVE=$$(ls build/asan/_native*.so) LD_PRELOAD=$$(c++ -print-file-name=libasan.so):$$(c++ -print-file-name=libstdc++.so) \
	  ASAN_OPTIONS=detect_leaks=0 $(BIN)/python -m pytest tests/fluxion_core/kernels tests/fluxion_core/pool \
	  tests/fluxion_core/decode/host/test_attention.py tests/fluxion_core/decode/host/test_predicted_policies.py tests/fluxion_core/decode/test_profiling.py \
	  tests/fluxion_core/generation/test_sampling.py "tests/fuzz/test_fuzz.py::test_whatever_comes_is_refused_by_name_or_accepted_whole[plane-7000]" \
	  --deselect tests/fluxion_core/kernels/test_isa.py

tsan: $(VENV)/.tested  ## the CPU pool's threads under ThreadSanitizer
	$(BIN)/python -m pytest tests/fluxion_core/pool/test_task_pool_threads.py

fuzz: $(VENV)/.tested  ## a million hand-off frames by each way, 100,000 tickets, as many model headers, 20,000 requests; resumes
	nice -n 15 $(BIN)/python -m tests.fuzz --journal build/fuzz.json

dashboards: $(VENV)/.tested  ## Grafana dashboards and console pages from deploy/grafana/panels.py
	$(BIN)/python deploy/grafana/generate.py

docs: $(VENV)/.tested  ## the site, into build/site; a broken link or anchor is an error
	$(BIN)/python docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

picture: $(VENV)/.tested  ## docs/architecture: the flow, every package, and a picture of imports
	$(BIN)/python docs/architecture/packages.py
	$(BIN)/python docs/architecture/flow.py

compose-test: $(VENV)/.tested  ## bring docker-compose.yml up for real: serve, lose a node, be scraped, go
	$(BIN)/python deploy/compose_test.py

faults: $(VENV)/.tested  ## what clients see when something fails, with real processes: docs/results/faults.md
	$(BIN)/python -m tests.faults

protos: $(VENV)/.tested  ## stubs from the .proto files
	$(BIN)/python protos/regenerate.py

native: $(VENV)/.installed  ## rebuild the extension

wheel: $(VENV)/bin/python  ## build/wheel: the wheel, tried in an empty environment
	rm -rf build/wheel
	$(call patiently,Building the wheel,PIP_CONSTRAINT=constraints.txt \
	  $(BIN)/python -m pip wheel --disable-pip-version-check -q --no-deps -w build/wheel .)
	$(BIN)/python -m venv build/wheel/empty
	$(call patiently,Installing it into an empty environment,PIP_CONSTRAINT=constraints.txt \
	  build/wheel/empty/bin/python -m pip install --disable-pip-version-check -q build/wheel/*.whl)
	cd build/wheel && empty/bin/python -c "from fluxion_core.client import Client; print(Client)"
	build/wheel/empty/bin/fluxion --version

$(VENV)/bin/python:
	$(call patiently,Making $(VENV),$(PYTHON) -m venv $(VENV))

$(VENV)/.installed: pyproject.toml constraints.txt $(NATIVE) | $(VENV)/bin/python
	$(call patiently,Installing and compiling into $(VENV),PIP_CONSTRAINT=constraints.txt \
	  $(BIN)/python -m pip install --disable-pip-version-check -q -e .)
	@touch $@

$(VENV)/.tested: $(VENV)/.installed
	$(call patiently,Installing what tests need into $(VENV),PIP_CONSTRAINT=constraints.txt \
	  $(BIN)/python -m pip install --disable-pip-version-check -q -e '$(FOR_TESTS)')
	@touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
