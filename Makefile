# `make demo` and `make test` do all set-up on a fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
export HF_HUB_OFFLINE ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test check venv bench compare mutants format clean

demo: $(STAMP)
	$(BIN)/steer compare "a photo of a red apple and a blue clock" \
	    --methods best_of_n,fk --heldout detector --nfe 800 --out out/demo

test: $(STAMP)
	$(BIN)/python -m pytest -q $(ARGS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tests/typecheck.py

bench: $(STAMP)
	$(BIN)/python -m benchmarks.run $(ARGS)

# Hours: every method, three budgets, three seeds; goes on where it was stopped.
compare: $(STAMP)
	$(BIN)/python -m benchmarks.comparison --dtype bfloat16 --page docs/comparison.md $(ARGS)

mutants: $(STAMP)
	$(BIN)/python tests/mutants.py $(ARGS)

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

venv: $(STAMP)

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --progress-bar off torch torchvision
	$(BIN)/pip install --quiet --progress-bar off -e ".[dev,rewards,serve,demo,cluster]"
	touch $(STAMP)

clean:
	rm -rf out build dist *.egg-info
