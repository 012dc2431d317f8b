# `make demo` and `make test` need Python 3.11 or newer, git and make; everything else is installed into .venv.
PYTHON ?= python3
BIN := .venv/bin
RUN := demo/run
EMB := demo/embeddings
SINCE ?= 1543e6d

.PHONY: demo run-demo test test-failed engines check docs house clean

.venv/demo: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[demo]'
	touch $@

.venv/dev: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

# The whole way on real images that come with a Python package: 5,000 MNIST digits, 1,000 of them held out, at random places of
# a larger canvas. Where digits are centred, pixels are as good as features; here neighbours by pixels are those at the same place.
demo: .venv/demo
	$(MAKE) run-demo

# The commands of the demo with the ssl-kit that is in $(BIN), in the current folder.
run-demo:
	rm -rf demo
	$(BIN)/ssl-kit pretrain mnist64:train -c simclr_mnist_demo --run $(RUN)
	$(BIN)/ssl-kit evaluate $(RUN) mnist64 --baselines pixels,pca,random_init,patches
	$(BIN)/ssl-kit finetune $(RUN) mnist64 --fraction 0.1 --batch-size 64
	$(BIN)/ssl-kit embed $(RUN) mnist64:train --out $(EMB)
	$(BIN)/ssl-kit index $(EMB)
	$(BIN)/python -c "from ssl_kit.data.opening import open_source as o; from PIL import Image; Image.fromarray(o('mnist64:test').read([7])[0]).save('demo/query.png')"
	$(BIN)/ssl-kit search $(EMB) demo/query.png -k 5 --html demo/search.html
	$(BIN)/ssl-kit report $(RUN)

# Two processes of two threads each: some faults need two threads; the passive ones do not spin for the other process.
test: .venv/dev
	OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# What failed the last time, one after the other.
test-failed: .venv/dev
	OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --last-failed --last-failed-no-failures none

# What needs Ray, Milvus, LanceDB or an S3 server: in an environment of its own, for their dependencies are many.
.venv-engines/engines: pyproject.toml
	$(PYTHON) -m venv .venv-engines
	.venv-engines/bin/python -m pip install --quiet --editable '.[engines]'
	touch $@

engines: .venv-engines/engines
	PATH=$(CURDIR)/.venv-engines/bin:$$PATH OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive .venv-engines/bin/python -m pytest tests/engines tests/test_interchange.py tests/data/test_remote.py

check: .venv/dev
	$(BIN)/ruff format --check ssl_kit tests benchmarks
	$(BIN)/ruff check ssl_kit tests benchmarks
	$(BIN)/mypy ssl_kit

.venv/docs: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	touch $@

# Warnings are errors, and so are links to pages and names that do not exist.
docs: .venv/docs
	$(BIN)/python -m sphinx -W --keep-going -n -q -b html docs docs/_build/html

clean:
	rm -rf .venv .venv-engines demo build dist docs/_build

# How many rooms, how large, how far from a recipe to the loss: it prints, it does not fail.
house: .venv/dev
	$(BIN)/python benchmarks/house.py --since $(SINCE)
