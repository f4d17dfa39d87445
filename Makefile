# The two commands of the README, and a few for whoever works on the house. Everything lives in .venv; nothing else is touched.
PYTHON ?= python3
VENV   ?= .venv
OUT    ?= tests/bench/results
RUN     = $(VENV)/bin/python

.PHONY: demo test bench gpu check clean

demo: $(VENV)/ready        ## quantize the demo FLUX to 4 bits, draw with both, write demo.png
	$(RUN) -m nibble demo --out demo.png

test: $(VENV)/ready        ## every test that this machine can run; the others say why they skip
	$(RUN) -m pytest -q tests

bench: $(VENV)/ready       ## ratios against peers, written to tests/bench/results
	$(RUN) -m nibble bench all

gpu:                       ## on a machine with a GPU and its own torch: check every op there, then measure (OUT=folder)
	$(PYTHON) -m pytest -q tests/kernels tests/quant/svdquant
	$(PYTHON) tests/bench/bench_ops.py --device cuda --out $(OUT)/ops-gpu.json

check: $(VENV)/ready
	$(VENV)/bin/ruff check .

$(VENV)/ready: pyproject.toml tests/requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -r tests/requirements.txt
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

clean:
	rm -rf $(VENV) demo.png demo-svdq-int4.safetensors build *.egg-info .pytest_cache
