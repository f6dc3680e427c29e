# One word per habit. Everything runs in a virtual environment that the first use makes.
VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin
INSTALLED = $(VENV)/.installed
TOOLS_INSTALLED = $(VENV)/.tools-installed
PROTO_TOOLS = .venv-protos
PROTO_TOOLS_INSTALLED = $(PROTO_TOOLS)/.installed
CHECKOV_VENV = .venv-checkov
CHECKOV_INSTALLED = $(CHECKOV_VENV)/.installed
AUDIT_VENV = .venv-audit
AUDIT_INSTALLED = $(AUDIT_VENV)/.installed
INTEGRATIONS = .venv-integrations
INTEGRATIONS_INSTALLED = $(INTEGRATIONS)/.installed
PROTO = protos/ormo_protos/v1/parameter_server.proto
GENERATE = PATH="$(CURDIR)/$(PROTO_TOOLS)/bin:$$PATH" $(PROTO_TOOLS)/bin/python -m grpc_tools.protoc -I protos \
    --python_out=$(1) --mypy_out=quiet:$(1) --grpc_python_out=$(1) --mypy_grpc_out=quiet:$(1) $(PROTO)
PACKAGES = ormo_protos ormo_runtime ormo_server ormo_worker

.DEFAULT_GOAL := help

.PHONY: help
help:  ## list these words
	@grep -hE '^[a-z -]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 28

RUNNING = server,worker,vision,sim
PIP_INSTALL = -m pip install --quiet --disable-pip-version-check

$(INSTALLED): pyproject.toml constraints.txt
	@echo "Installing into $(VENV) what training needs: a few minutes, for PyTorch is large."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP_INSTALL) -c constraints.txt -e '.[$(RUNNING)]'
	touch $@

$(TOOLS_INSTALLED): $(INSTALLED)
	@echo "Installing into $(VENV) what tests and deploy/ need besides: about a minute."
	$(BIN)/python $(PIP_INSTALL) -c constraints.txt -e '.[$(RUNNING),dev,deploy]'
	touch $@

.PHONY: install
install: $(INSTALLED)  ## make the virtual environment, with what training needs

.PHONY: tools
tools: $(TOOLS_INSTALLED)  ## install besides what tests and deploy/ need, as `make test` does

.PHONY: train
train: $(INSTALLED)  ## train a small model with a server and four workers on this machine
	$(BIN)/ormo-local --task digits --workers 4 --slow 1:4x

# Goes on where it was interrupted. DATA is the data's folder; INTO= leaves the page as it is.
SUITE ?= digits
INTO ?= docs/results.md
.PHONY: reproduce
reproduce: $(INSTALLED)  ## compare the methods in virtual time and write the table into docs/results.md (SUITE=, DATA=)
	$(BIN)/ormo-sim reproduce --suite $(SUITE) $(if $(DATA),--data-dir $(DATA)) $(if $(INTO),--into $(INTO)) $(FLAGS)

# From the root, all but `trips`, which compares with other libraries and therefore installs them.
TRIPS_INSTALL = $(BIN)/python $(PIP_INSTALL) -c constraints.txt -e '.[bench]'
BENCH_trips = $(TRIPS_INSTALL) && cd tests && $(abspath $(BIN))/python -m benchmarks.round_trips --into ../build/bench
BENCH_scale = $(BIN)/python tests/benchmarks/scale.py
BENCH_links = $(BIN)/python tests/benchmarks/links.py
BENCH_soak = $(BIN)/python tests/benchmarks/soak.py
BENCH_memory = $(BIN)/python tests/benchmarks/memory.py
BENCH_sim = $(BIN)/python tests/benchmarks/sim_overhead.py
BENCH_metrics = $(BIN)/python tests/benchmarks/metrics_cost.py
BENCHES = trips scale links soak memory sim metrics

# trips: how fast tensors travel, next to what one would use instead (FLAGS=--quick). scale: how evenly many small
# workers are served. links: what `--in-flight 2`, bfloat16 and int8 gain on a slow link. soak: 20,000 gradients of 1
# MB, and the server's memory stays as it is. memory: what an exchange under way takes of it. sim: what a simulated push
# costs besides its gradient. metrics: what they cost.
WHAT ?= trips
.PHONY: bench
bench: $(TOOLS_INSTALLED)  ## measure WHAT=trips (the default), scale, links, soak, memory, sim or metrics (FLAGS=, see --help)
	$(if $(filter $(WHAT),$(BENCHES)),,$(error there is no WHAT=$(WHAT): use one of $(BENCHES)))
	$(BENCH_$(WHAT)) $(FLAGS)

# Until the next release.
.PHONY: scale links soak benchmark
scale links soak:
	@echo "\`make $@\` goes with the next release: type \`make bench WHAT=$@\`." >&2
	@$(MAKE) bench WHAT=$@
benchmark:
	@echo "\`make benchmark\` goes with the next release: type \`make bench WHAT=sim\`, or WHAT=metrics." >&2
	@$(MAKE) bench WHAT=sim
	@$(MAKE) bench WHAT=metrics

# Three processes for two cores, as a third of the time of tests is spent waiting for leases, alerts and other processes.
# With a thread of PyTorch's for each core in each of them, threads wait for each other, and a third of the processor's
# time goes into that. What checks deploy/ is found on the PATH, and left out with a sentence where it is missing.
PROCESSES = $$($(BIN)/python -c "import os; print(max(2, 3 * os.cpu_count() // 2))")
TEST = OMP_NUM_THREADS=1 PATH="$(abspath $(BIN)):$$PATH" ORMO_CHECKOV="$(wildcard $(abspath $(CHECKOV_VENV))/bin/checkov)" \
    $(BIN)/python -m pytest --dist worksteal

.PHONY: test
test: $(TOOLS_INSTALLED)  ## run the tests
	$(TEST) -n $(PROCESSES)

.PHONY: check
check: lint drift types test  ## all that a change must pass before it is shown to others

.PHONY: test-images
test-images: $(TOOLS_INSTALLED)  ## run the images' build steps and what they install, without a container engine
	CHECK_IMAGES=1 $(TEST) tests/deploy/docker

# In a network and a numbering of processes of their own, with which all ends that they start, whatever happens. The
# folder CONTAINERS keeps what was fetched for the next time.
CONTAINERS ?= build/containers
.PHONY: test-containers
test-containers: $(TOOLS_INSTALLED)  ## build the images and run, break and heal a composed run of them, as root, by an engine of its own
	$(BIN)/python tests/deploy/platforms/trees.py $(CONTAINERS)
	ORMO_CONTAINERS=$(abspath $(CONTAINERS)) unshare --net --pid --mount-proc --fork --kill-child \
	    $(BIN)/python -m pytest tests/deploy/platforms $(FLAGS)

.PHONY: test-cluster
test-cluster: $(TOOLS_INSTALLED)  ## do the same in namespaces of their own on the cluster that KUBECONFIG names
	TEST_CLUSTER=1 $(BIN)/python -m pytest tests/deploy/platforms $(FLAGS)

# Not part of `make test`: they start clusters on this machine, and take minutes.
.PHONY: test-ray
test-ray: $(TOOLS_INSTALLED)  ## run `ormo-ray` on a Ray cluster of three nodes on this machine, one of which is killed
	$(BIN)/python $(PIP_INSTALL) -c constraints.txt -e '.[ray]'
	TEST_RAY=1 $(TEST) tests/integrations/test_ray.py

.PHONY: test-slurm
test-slurm: $(TOOLS_INSTALLED)  ## run the batch script under a Slurm of two nodes on this machine, if its programs are installed
	TEST_SLURM=1 $(TEST) tests/integrations/test_slurm.py

# A linter with so many dependencies that it has an environment of its own.
$(CHECKOV_INSTALLED):
	$(PYTHON) -m venv $(CHECKOV_VENV)
	$(CHECKOV_VENV)/bin/python $(PIP_INSTALL) checkov==3.3.30
	touch $@

.PHONY: checkov
checkov: $(CHECKOV_INSTALLED)  ## install the linter of manifests and images, for `make test`

$(AUDIT_INSTALLED):
	$(PYTHON) -m venv $(AUDIT_VENV)
	$(AUDIT_VENV)/bin/python $(PIP_INSTALL) pip-audit==2.10.1
	touch $@

.PHONY: audit
audit: $(AUDIT_INSTALLED)  ## look all pinned dependencies up in the database of advisories
	$(AUDIT_VENV)/bin/python tests/audit.py constraints.txt

# What another version of a dependency can break, and no more: all else is tested as pinned.
# protos: protobuf reads and writes what ours does, and numpy's bytes.
VERSIONED = protos
# service, security: gRPC's streams, statuses, cancellations, limits, TLS; health, reflection; what Prometheus reads.
VERSIONED += $(patsubst %,service/test_%.py,cancellation end exchanges foreign_client malformed metrics refusals)
VERSIONED += $(patsubst %,security/test_%.py,tls tokens limits silence)
# runtime, docs/test_commands.py: pydantic reads the settings of every program; records of the log, and the port for HTTP.
VERSIONED += $(patsubst %,runtime/test_%.py,settings all_settings logs http_port proxies tls) docs/test_commands.py
# journal, store, old_versions: files by safetensors and numpy, also those that earlier versions wrote.
VERSIONED += journal store old_versions
# worker: gRPC's other end, and data sets by scikit-learn, pillow and torchvision. Its other ways to run are of our own.
VERSIONED += worker
NOT_VERSIONED = $(patsubst %,--ignore-glob='tests/worker/*test_%.py',local* followed simulated)
# console: rich. sim/test_plots.py: matplotlib. And all of it together in one training by real programs.
VERSIONED += console sim/test_plots.py system/test_training.py::test_local_run_trains_evaluates_and_cleans_up
# PyTorch's version is the same in all, so that it need not be unpacked again: a link takes no time and no room.
LINKED = $(foreach name,torch* functorch*,$(VENV)/lib/python3*/site-packages/$(name))
.PHONY: test-lowest test-newest
test-lowest test-newest: test-%: $(TOOLS_INSTALLED)  ## test what stands on others' versions with the lowest, or newest, that are allowed
	rm -rf .venv-$*
	$(BIN)/python -m venv .venv-$*
	cp --archive --link $(LINKED) .venv-$*/lib/python3*/site-packages/
	.venv-$*/bin/python $(PIP_INSTALL) -c constraints-$*.txt -e '.[$(RUNNING),dev]'
	.venv-$*/bin/python -m pip check
	OMP_NUM_THREADS=1 .venv-$*/bin/python -m pytest -n $(PROCESSES) --dist worksteal $(NOT_VERSIONED) $(addprefix tests/,$(VERSIONED))

$(INTEGRATIONS_INSTALLED): $(TOOLS_INSTALLED)
	@echo "Installing into $(INTEGRATIONS) the libraries that are tested with: about two minutes."
	rm -rf $(INTEGRATIONS)
	$(BIN)/python -m venv $(INTEGRATIONS)
	cp --archive --link $(LINKED) $(INTEGRATIONS)/lib/python3*/site-packages/
	$(INTEGRATIONS)/bin/python $(PIP_INSTALL) -c constraints.txt -e '.[$(RUNNING),dev,integrations]'
	$(INTEGRATIONS)/bin/python -m pip check
	touch $@

# In an environment of their own, so that `make test` shows that nobody needs one of these libraries.
.PHONY: integrations test-integrations
integrations: $(INTEGRATIONS_INSTALLED)  ## install the trainers, trackers and stores that `make test-integrations` tests with
test-integrations: $(INTEGRATIONS_INSTALLED)  ## test with real trainers, trackers and stores: Trainer, Lightning and so on
	OMP_NUM_THREADS=1 $(INTEGRATIONS)/bin/python -m pytest -n $(PROCESSES) --dist worksteal tests/integrations

# Seconds for each of the four targets, and of hostile traffic to a server that trains.
SECONDS ?= 60
HOSTILE ?= 60
.PHONY: fuzz
fuzz: $(TOOLS_INSTALLED)  ## search, guided by coverage, for bytes that the server misreads, and send it some (SECONDS=, HOSTILE=)
	$(BIN)/python $(PIP_INSTALL) -c constraints.txt -e '.[fuzz]'
	$(BIN)/python tests/fuzz/run.py fuzz_framing $(SECONDS)
	$(BIN)/python tests/fuzz/run.py fuzz_exchange $(SECONDS)
	$(BIN)/python tests/fuzz/run.py fuzz_journal $(SECONDS)
	$(BIN)/python tests/fuzz/run.py fuzz_checkpoint $(SECONDS)
	HOSTILE_SECONDS=$(HOSTILE) $(BIN)/pytest -q -s --timeout 0 tests/system/test_hostile_traffic.py

.PHONY: chaos
chaos: $(TOOLS_INSTALLED)  ## kill and cut off servers and workers under load, and prove that nothing is lost or doubled (FLAGS=)
	cd tests && $(abspath $(BIN))/python -m chaos $(FLAGS)

.PHONY: lint
lint: $(TOOLS_INSTALLED)  ## check style, and that the contract only grew since its release
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/buf lint
	$(BIN)/buf format --diff --exit-code
	$(BIN)/buf breaking --against protos/released.binpb

.PHONY: format
format: $(TOOLS_INSTALLED)  ## put code and contract in shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/buf format --write

.PHONY: types
types: $(TOOLS_INSTALLED)  ## check types
	$(BIN)/mypy $(addprefix -p ,$(PACKAGES))
	cd deploy/grafana && $(abspath $(BIN))/mypy --strict generate.py
	$(BIN)/mypy --strict deploy/prometheus/generate.py
	$(BIN)/mypy --strict deploy/docker/metrics_answer.py

# An old generator on purpose: what it writes runs with every gRPC and protobuf since, newer ones refuse older runtimes.
$(PROTO_TOOLS_INSTALLED): protos/generator.txt
	$(PYTHON) -m venv $(PROTO_TOOLS)
	$(PROTO_TOOLS)/bin/python $(PIP_INSTALL) -r protos/generator.txt
	touch $@

.PHONY: protos
protos: $(PROTO_TOOLS_INSTALLED)  ## generate the code of the contract
	$(call GENERATE,protos)

.PHONY: drift
drift: $(PROTO_TOOLS_INSTALLED)  ## check that the generated code is the contract's
	rm -rf build/protos && mkdir -p build/protos
	$(call GENERATE,build/protos)
	cd build/protos && for file in $$(find . -type f); do diff "$$file" "$(CURDIR)/protos/$$file" || exit 1; done

.PHONY: release-protos
release-protos: $(TOOLS_INSTALLED)  ## take the contract as it is for released: from now on it may only grow
	$(BIN)/buf build -o protos/released.binpb

.PHONY: dashboards
dashboards: $(TOOLS_INSTALLED)  ## write Grafana's dashboards and the operator's rules anew
	$(BIN)/python deploy/grafana/generate.py
	$(BIN)/python deploy/prometheus/generate.py

.PHONY: reference readme
reference readme: $(TOOLS_INSTALLED)  ## write docs/reference/ and the pages' generated tables anew
	$(BIN)/python docs/reference_pages.py

.PHONY: picture
picture: $(TOOLS_INSTALLED)  ## train for some seconds and draw the pages' picture of `ormo-server top`
	cd tests && $(abspath $(BIN))/python picture_of_top.py

.PHONY: clean
clean:  ## remove what the other words made
	rm -rf $(VENV) $(PROTO_TOOLS) $(CHECKOV_VENV) $(AUDIT_VENV) .venv-lowest .venv-newest $(INTEGRATIONS) .mypy_cache .pytest_cache .ruff_cache .hypothesis

.PHONY: docs docs-serve
docs docs-serve: $(TOOLS_INSTALLED)  ## build the pages into build/docs, every link checked; or show them while you write
	$(BIN)/python $(PIP_INSTALL) -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs $(if $(filter docs-serve,$@),serve,build --strict)
