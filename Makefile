# Two commands: `make demo` (install, then the whole story on drawings made here) and `make test`.
# `make torture` measures the promises of robustness, in a quarter of an hour on two cores.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test torture clean

demo: $(VENV)/.installed
	$(BIN)/sanctl demo

test: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	# A process for every core; more threads than cores would only wait for each other.
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist worksteal

torture: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python tests/torture

# The stamps make a second run skip pip altogether. torch and torchvision come together from
# the package index, as sanctl's dependencies: a CPU-only torch does not fit the index's torchvision.
$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/pip install --quiet --editable .
	touch $@

# With LOCK=1, as continuous integration has it, exactly the files of requirements-dev.lock, by their
# hashes, where they are for: Linux on x86-64 with Python 3.11.
FITS_LOCK = import platform, sys; sys.exit((*sys.version_info[:2], platform.system(), \
	platform.machine()) != (3, 11, "Linux", "x86_64"))

$(VENV)/.installed-dev: pyproject.toml requirements-dev.lock | $(BIN)/python
	if [ -n "$(LOCK)" ] && $(BIN)/python -c '$(FITS_LOCK)'; then \
		$(BIN)/pip install --quiet --require-hashes --requirement requirements-dev.lock && \
		$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .; \
	else \
		$(BIN)/pip install --quiet --editable '.[dev]'; \
	fi
	touch $@ $(VENV)/.installed

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip

clean:
	rm -rf $(VENV) build dist *.egg-info
