# `make demo` and `make test` do all their set-up alone: they need git, make and Python 3.11 or 3.12 with pip.
# Another interpreter than python3: make test PYTHON=python3.12

PYTHON ?= python3
PY := .venv/bin/python
UV := .uv/bin/uv

# The package is called `ssl`: with the root on the path it stands before the standard module in every child process.
export PYTHONPATH := $(CURDIR)
# uv takes the interpreter named above, and trusts the certificates that the machine trusts.
export UV_PYTHON_DOWNLOADS := never
export UV_SYSTEM_CERTS ?= 1
# So that the many short processes of the tests, and workers, start in half the time from the first call on.
export UV_COMPILE_BYTECODE := 1
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1
# Settings of other projects that would send the packages elsewhere.
unexport VIRTUAL_ENV UV_PROJECT_ENVIRONMENT

VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
READY := .venv/.ready-$(VERSION)

.PHONY: help demo bench docs test test-name format setup lock clean
help:
	@echo "make demo       pretrain on the embedded images, score the backbone, draw a picture (minutes)"
	@echo "make bench      every part beside the peers' way in one table, small sizes (minutes)"
	@echo "make docs       the documentation as a site that opens from the disk: site/index.html"
	@echo "make test       formatting, lint, types, tests"
	@echo "make test-name  the standard library's own tests of its module ssl, against this package"
	@echo "make format     format the code and mend what lint can mend"
	@echo "make setup      make .venv and install what uv.lock pins (demo and test do this themselves)"
	@echo "make lock       resolve pyproject.toml into uv.lock again"
	@echo "make clean      remove .venv, .uv, site and caches; runs stay"

demo: $(READY)
	@$(PY) -m eval.demo

bench: $(READY)
	@$(PY) -m benchmarks --quick

# The variable ends a note of the theme's about a later MkDocs, which this project does not use.
docs: $(READY)
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet --strict
	@echo "written: site/index.html"

test: $(READY)
	@$(PY) -m ruff format --check --quiet . || { echo "formatting differs: run make format" >&2; exit 1; }
	@$(PY) -m ruff check --quiet .
	@$(PY) -m pyright
	@$(PY) -m pytest -n 2 --dist loadfile

# On the interpreter itself: Debian keeps the standard library's tests in the package libpython3-testsuite.
test-name:
	$(PYTHON) -m test test_ssl

format: $(READY)
	@$(PY) -m ruff format .
	@$(PY) -m ruff check --fix .

setup: $(READY)

# The stamp bears the version, so that another PYTHON= makes .venv anew, and lies in .venv, so that it goes with it.
$(READY): $(UV) pyproject.toml uv.lock
	@case "$(VERSION)" in 3.11|3.12) ;; \
	"") echo "$(PYTHON) does not run: install Python 3.11 or 3.12, or name one, as in make test PYTHON=python3.12" >&2; exit 1;; \
	*) echo "$(PYTHON) is Python $(VERSION), needed is 3.11 or 3.12: name one, as in make test PYTHON=python3.12" >&2; exit 1;; \
	esac
	@echo "Installing what uv.lock pins into .venv (about 6 GB on Linux, most of it CUDA for torch)"
	@$(UV) sync --frozen --python "$$(command -v $(PYTHON))"
	@touch $@

# --target is allowed where the distribution owns the interpreter (PEP 668) and pip may not install into it.
$(UV):
	@PIP_USER=0 PIP_REQUIRE_VIRTUALENV=0 $(PYTHON) -m pip install --quiet --disable-pip-version-check --target .uv "uv>=0.9"

lock: $(UV)
	@$(UV) lock --no-config --default-index https://pypi.org/simple --python "$$(command -v $(PYTHON))"

clean:
	rm -rf .venv .uv .pytest_cache .ruff_cache site
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
