# The two commands of the README, and a few for whoever works on the house. Everything lives in .venv; nothing else is touched.
PYTHON  ?= python3
VENV    ?= .venv
OUT     ?= tests/bench/results
ARCHS   ?= native
CAPABILITY ?= 90
SECONDS ?= 420
RUN      = $(VENV)/bin/python
CXX_HERE = $(shell command -v $(CXX) 2>/dev/null)
NPX      = $(shell command -v npx 2>/dev/null)
WEB      = "web/**/*.{js,mjs}"
CXX_FILES = find kernels/csrc tests -name '*.cu' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.h' -o -name '*.inl'
SOURCES  = $(wildcard kernels/pyproject.toml kernels/CMakeLists.txt kernels/cmake/* kernels/csrc/*.* kernels/csrc/cpu/*.* kernels/csrc/cpu/*/*)

# As node_modules would have it; change it together with .pre-commit-config.yaml.
PRETTIER = prettier@3.10.1

.PHONY: demo test test-kernels test-others test-plain-torch bench gpu gpu-compile gpu-extension gpu-tests release-check lint lint-python lint-cxx lint-web types format clean

demo: $(VENV)/ready        ## quantize the demo FLUX to 4 bits, draw with both, write demo.png
	$(RUN) -m nibble demo --out demo.png

test: $(VENV)/kernels      ## every test that this machine can run, two runs at a time; the others say why they skip
	$(MAKE) -k -j 2 test-kernels test-others test-plain-torch

# one thread each: small tensors gain nothing from two
test-kernels: $(VENV)/kernels
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q tests/kernels

test-others: $(VENV)/kernels
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q tests --ignore tests/kernels

test-plain-torch: $(VENV)/kernels
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q tests/kernels --without-extension

bench: $(VENV)/kernels     ## ratios against peers, written to tests/bench/results
	$(RUN) -m nibble bench all

gpu:                       ## on a machine with a GPU and its own torch: which paths are right, and how fast (OUT=folder); no compiler, no network
	mkdir -p $(OUT)
	$(PYTHON) tests/bench/bench_gpu.py --out $(OUT)/gpu.json --seconds $(SECONDS)

release-check:             ## what the registry takes, installed where nothing can compile (after `python -m nibble cubins` and `libraries --platforms all`)
	$(PYTHON) tests/release/check.py

gpu-compile:               ## the kernels of that run, compiled beforehand on any machine with NVRTC, into build/gpu-cache (CAPABILITY=90)
	$(PYTHON) tests/bench/bench_gpu.py --compile $(CAPABILITY)

gpu-tests:                 ## the tests that need a GPU
	$(PYTHON) -m pytest -q -rs -m gpu --maxfail=20 tests/kernels tests/quant/svdquant

gpu-extension:             ## the same run of the compiled extension: nvcc and cmake (ARCHS=native)
	mkdir -p $(OUT)
	cmake -G Ninja -S kernels -B build/gpu -DNIBBLE_CUDA=ON "-DNIBBLE_CUDA_ARCHS=$(ARCHS)" -DPython_EXECUTABLE=$$(command -v $(PYTHON)) > $(OUT)/build.log 2>&1 \
		&& cmake --build build/gpu --verbose >> $(OUT)/build.log 2>&1 || { tail -40 $(OUT)/build.log; exit 1; }
	-$(PYTHON) tests/kernels/check_resources.py --module build/gpu/nibble_kernels*.so --spills-only --json $(OUT)/resources.json >> $(OUT)/build.log 2>&1
	PYTHONPATH=build/gpu $(PYTHON) tests/bench/bench_gpu.py --extension --out $(OUT)/gpu-extension.json --seconds $(SECONDS)

lint: lint-python lint-cxx lint-web types  ## format, lint and types; `make -k lint` goes on after the first that fails

lint-python: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

lint-cxx: $(VENV)/ready
	$(CXX_FILES) | xargs $(VENV)/bin/clang-format --dry-run -Werror

lint-web:
ifeq ($(NPX),)
	@echo "LEFT OUT: no npx here (node 18 or newer), so the format of web/ was NOT checked"
else
	$(NPX) --yes $(PRETTIER) --check $(WEB)
endif

types: $(VENV)/ready       ## mypy knows a package by its folder's name, which is any here: hence the link
	mkdir -p build/mypy && ln -sfn ../.. build/mypy/nibble
	$(VENV)/bin/mypy

format: $(VENV)/ready      ## what `lint` would have: written
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(CXX_FILES) | xargs $(VENV)/bin/clang-format -i
	$(if $(NPX),$(NPX) --yes $(PRETTIER) --write $(WEB),@echo "LEFT OUT: no npx here, so web/ was NOT formatted")

$(VENV)/ready: pyproject.toml tests/requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -r tests/requirements.txt
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

# The compiled CPU path, about a minute on one core. Without a compiler everything runs in plain torch.
$(VENV)/kernels: $(VENV)/ready $(SOURCES)
ifeq ($(CXX_HERE),)
	@echo "no C++ compiler here: the compiled CPU path is left out, and its tests skip"
else
	PATH="$(abspath $(VENV))/bin:$$PATH" $(VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation \
		--config-settings=cmake.define.NIBBLE_CUDA=OFF ./kernels
endif
	touch $@

clean:
	rm -rf $(VENV) demo.png demo-svdq-int4.safetensors build dist *.egg-info .pytest_cache .ruff_cache
