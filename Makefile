# Each target makes .venv and installs what it needs by itself.
PY := .venv/bin/python
PIP := $(PY) -m pip --disable-pip-version-check install -q -c constraints.txt
CXX_FILES := $(shell find csrc python/bindings -name '*.cpp' -o -name '*.h' -o -name '*.cu*')

.PHONY: demo test bench lint format clean

.venv/ready: pyproject.toml setup.py constraints.txt CMakeLists.txt $(CXX_FILES)
	test -x $(PY) || python3 -m venv .venv
	$(PIP) torch numpy
	$(PIP) -e '.[dev]'
	touch $@

demo: .venv/ready
	.venv/bin/kvpo-train train --config demo --out runs/demo-$$(date +%Y%m%d-%H%M%S)

test: .venv/ready build/sanitized/ready
	.venv/bin/ctest --test-dir build/sanitized --output-on-failure
	$(PY) -m pytest
	$(PY) -m pytest benchmarks --benchmark-disable

# The kernels without Python, under ASan and UBSan.
build/sanitized/ready: .venv/ready CMakeLists.txt $(CXX_FILES)
	.venv/bin/cmake -S . -B build/sanitized -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/.venv/bin/ninja \
		-DKVPO_TESTS=ON -DKVPO_SANITIZE=ON -DCMAKE_BUILD_TYPE=None -DCMAKE_CXX_FLAGS=-O1
	.venv/bin/cmake --build build/sanitized
	touch $@

bench: .venv/ready
	$(PY) -m pytest benchmarks --benchmark-only --bars --benchmark-columns=min,median,iqr,rounds

lint: .venv/ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/clang-format --dry-run -Werror $(CXX_FILES)

format: .venv/ready
	-.venv/bin/ruff check --fix .
	.venv/bin/ruff format .
	.venv/bin/clang-format -i $(CXX_FILES)

clean:
	rm -rf .venv build *.egg-info kvpo_kernels/*.so kvpo_kernels/_build.json
