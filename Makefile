# Every operation of the project, one line of help each.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory
# Node 24 comes from npm: the machine's own may be past its end of life.
export PATH := $(CURDIR)/node_modules/.bin:$(PATH)
# FROM=, TO=, PIPELINE= … reach the scripts because make puts its command-line variables into the recipes' environment;
# no recipe expands them into a shell line.

.PHONY: help
help: ## Print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

node_modules/.package-lock.json: package-lock.json
	@echo "setup: npm ci (Node 24 and the libraries of package-lock.json)" >&2
	@npm ci --no-audit --no-fund --loglevel=error >&2
	@touch $@

.PHONY: setup
setup: node_modules/.package-lock.json

.PHONY: up
up: setup ## Install what is missing into .stack/, start the local stack, create its tables
	@node test/stack/up.ts

.PHONY: down
down: setup ## Stop the local stack (its data stays)
	@node test/stack/down.ts

.PHONY: stack-status
stack-status: setup ## Say which parts of the local stack run
	@node test/stack/status.ts

.PHONY: data
data: setup ## Load the real data into the local source
	@node test/data/load.ts

.PHONY: migrate
migrate: setup ## Create what the pipelines need and is missing (DRY_RUN=1 says what)
	@node scripts/ops/migrate.ts

.PHONY: orders
orders: setup ## Sync orders to BigQuery (FROM= TO= reads a window again)
	@node scripts/orders.ts

.PHONY: rewind
rewind: setup ## Set a watermark back: PIPELINE= TO=
	@node scripts/ops/rewind.ts

.PHONY: status
status: setup ## Where each pipeline is (JSON=1 for programs)
	@node scripts/ops/status.ts
