# The two commands of the README, and a few for whoever works on the house. Everything lives in .venv; nothing else is touched.
PYTHON  ?= python3
VENV    ?= .venv
OUT     ?= tests/bench/results
ARCHS   ?= native
MINUTES ?= 5
RUN      = $(VENV)/bin/python
CXX_HERE = $(shell command -v $(CXX) 2>/dev/null)
SOURCES  = $(wildcard kernels/pyproject.toml kernels/CMakeLists.txt kernels/cmake/* kernels/csrc/*.* kernels/csrc/cpu/*.* kernels/csrc/cpu/simd/*)

.PHONY: demo test bench gpu check clean

demo: $(VENV)/ready        ## quantize the demo FLUX to 4 bits, draw with both, write demo.png
	$(RUN) -m nibble demo --out demo.png

test: $(VENV)/kernels      ## every test that this machine can run; the others say why they skip. One thread: small tensors gain nothing from two
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q tests
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q tests/kernels --without-extension

bench: $(VENV)/kernels     ## ratios against peers, written to tests/bench/results
	$(RUN) -m nibble bench all

gpu:                       ## on a machine with a GPU and its own torch: build for it, check every op there, measure (OUT=folder); needs no network
	mkdir -p $(OUT)
	cmake -G Ninja -S kernels -B build/gpu -DNIBBLE_CUDA=ON "-DNIBBLE_CUDA_ARCHS=$(ARCHS)" -DPython_EXECUTABLE=$$(command -v $(PYTHON)) > $(OUT)/build.log 2>&1 \
		&& cmake --build build/gpu --verbose >> $(OUT)/build.log 2>&1 || { tail -40 $(OUT)/build.log; exit 1; }
	-$(PYTHON) tests/kernels/check_resources.py --module build/gpu/nibble_kernels*.so --spills-only --json $(OUT)/resources.json >> $(OUT)/build.log 2>&1
	-PYTHONPATH=build/gpu timeout 120 $(PYTHON) -m pytest -q -rs -m gpu --maxfail=20 tests/kernels tests/quant/svdquant > $(OUT)/tests.log 2>&1; tail -25 $(OUT)/tests.log
	PYTHONPATH=build/gpu $(PYTHON) tests/bench/bench_gpu.py --out $(OUT)/gpu.json --minutes $(MINUTES)

check: $(VENV)/ready
	$(VENV)/bin/ruff check .

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
	rm -rf $(VENV) demo.png demo-svdq-int4.safetensors build *.egg-info .pytest_cache
