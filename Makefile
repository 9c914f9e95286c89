# Every target sets up what it needs: a virtual environment in .venv with the project in it. All it takes is Python 3.11-3.13 with venv, and make.
# Another Python: make test PYTHON=/path/to/python3.12
PYTHON ?=
CANDIDATES := $(or $(PYTHON),python3.11 python3.12 python3.13 python3 python)
# One that only looks like Python (a shim without a version, a Debian Python without its venv package) is passed over: each is run.
WORKS := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
BIN := .venv/bin
READY := .venv/.installed
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
# tutorials call `covid3d` in a shell
IN_VENV := PATH="$(CURDIR)/.venv/bin:$$PATH"

.DEFAULT_GOAL := help
.PHONY: help demo test fuzz kill test-processors test-oldest site test-site notebooks export bench weights clean
.DELETE_ON_ERROR:

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## */\1\t/p' Makefile | while IFS='	' read -r t d; do printf '  make %-16s %s\n' "$$t" "$$d"; done

demo: $(READY) ## synthetic chest CTs, training, scores on unseen ones, a picture: some minutes; OUT=folder says where
	$(BIN)/covid3d demo --overwrite $(if $(OUT),--out "$(OUT)")

test: $(READY) ## lint, run every notebook, then pytest
	$(BIN)/ruff check nbs covid3d tests benchmarks
	$(ONE_THREAD) $(IN_VENV) $(BIN)/nbdev-test --n-workers 2 --do-print --timing
	$(ONE_THREAD) $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder tests

fuzz: $(READY) ## the long form of the fuzz tests: 10,000 damaged NIfTI and 2,000 DICOM; some ten minutes
	COVID3D_FUZZ=10000 $(BIN)/python -m pytest -q tests/test_fuzz.py
	COVID3D_FUZZ=2000 $(BIN)/python -m pytest -q tests/test_fuzz_dicom.py

KILLS ?= 10
kill: $(READY) ## the long form of the kill tests: every command killed KILLS times (10) at random moments
	COVID3D_KILLS=$(KILLS) $(ONE_THREAD) $(BIN)/python -m pytest -q tests/test_kills.py tests/test_resume.py

test-processors: $(READY) ## notebooks and tests under other instruction sets and numbers of threads; hours
	@for isa in 'SSE41 default' 'AVX2 avx2' 'AVX512_CORE avx2'; do for n in 1 2; do set -- $$isa; \
	  echo "== oneDNN $$1, ATen $$2, $$n threads"; export ONEDNN_MAX_CPU_ISA=$$1 ATEN_CPU_CAPABILITY=$$2 OMP_NUM_THREADS=$$n MKL_NUM_THREADS=$$n; \
	  $(IN_VENV) $(BIN)/nbdev-test --n-workers 2 --do-print || exit 1; $(BIN)/python -m pytest -q tests || exit 1; done; done

test-oldest: ## notebooks and tests with the oldest packages that still install together, in .venv-oldest
	$(or $(PYTHON),python3.11) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install -c tests/oldest.txt -e '.[dev,dicom]'
	$(ONE_THREAD) PATH="$(CURDIR)/.venv-oldest/bin:$$PATH" .venv-oldest/bin/nbdev-test --n-workers 2 --do-print
	$(ONE_THREAD) .venv-oldest/bin/python -m pytest -q tests

site: $(READY) ## build the documentation site into _docs/, and README.md
	$(BIN)/python nbs/_site/build.py

test-site: site ## drive the built site in Chromium, and build it once more: equal?; some minutes
	COVID3D_SITE=_docs $(ONE_THREAD) $(BIN)/python -m pytest -q tests/test_site.py

notebooks: $(READY) ## run every notebook, save its outputs, then clean and export
	$(ONE_THREAD) $(IN_VENV) PYTHONWARNINGS=ignore $(BIN)/nbdev-test --n-workers 2 --do-print --timing --save
	$(MAKE) export

export: $(READY) ## clean the notebooks, write covid3d/ and README.md from them
	$(BIN)/nbdev-clean
	$(BIN)/nbdev-export
	$(BIN)/python nbs/_site/build.py --readme

bench: $(READY) ## the comparisons in benchmarks/, with the peers installed (long; needs COVID3D_TEST_DATA)
	$(BIN)/python -m pip install -e '.[dev,dicom,bench]'
	@for f in benchmarks/*.py; do echo "$$f"; $(BIN)/python "$$f" || exit 1; done

WEIGHTS = $(or $(OUT),_weights)
weights: $(READY) ## make weights like those that come with covid3d, in six rounds: hours on a CPU, on a GPU if there is one; resumes; OUT=folder
	$(BIN)/covid3d pretrain --resume -o "$(WEIGHTS)/1"
	$(BIN)/covid3d pretrain --resume -o "$(WEIGHTS)/2" --init "$(WEIGHTS)/1/model.safetensors" --seed 1000 --lr 7e-4 --epochs 14
	$(BIN)/covid3d pretrain --resume -o "$(WEIGHTS)/3" --init "$(WEIGHTS)/2/covid3d.safetensors" --seed 7000 --lr 7e-4 --epochs 24
	$(BIN)/covid3d pretrain --resume -o "$(WEIGHTS)/4" --init "$(WEIGHTS)/3/model.safetensors" --seed 9000 --lr 5e-4 --epochs 12 --patients 200
	$(BIN)/covid3d pretrain --resume -o "$(WEIGHTS)/5" --init "$(WEIGHTS)/4/model.safetensors" --seed 11000 --lr 5e-4 --epochs 12 --patients 250
	$(BIN)/covid3d pretrain --resume -o "$(WEIGHTS)/6" --init "$(WEIGHTS)/5/model.safetensors" --seed 13000 --lr 5e-4 --epochs 12 --patients 250

clean: ## remove what the targets built; .venv stays
	rm -rf _docs _proc _stage build dist .pytest_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

$(BIN)/python:
	@py=; for p in $(CANDIDATES); do if "$$p" -c '$(WORKS)' >/dev/null 2>&1; then py=$$p; break; fi; done; \
	if [ -z "$$py" ]; then echo "covid3d: none of '$(CANDIDATES)' is Python 3.11, 3.12 or 3.13 with venv; install one, or name it: make PYTHON=/path/to/python3.12" >&2; exit 1; fi; \
	echo "$$py -m venv .venv"; "$$py" -m venv --clear .venv

$(READY): $(BIN)/python setup.py settings.ini pyproject.toml
	$(BIN)/python -m pip install -e '.[dev,dicom]'
	@touch $@
