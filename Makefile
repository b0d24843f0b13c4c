# Every operation of the project, one line of help each.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory
# Node 24 comes from npm: the machine's own may be past its end of life.
export PATH := $(CURDIR)/node_modules/.bin:$(PATH)
# Node keeps what it compiled: a script then starts in a third of the time.
export NODE_COMPILE_CACHE := $(CURDIR)/node_modules/.cache/compile
# FROM=, TO=, PIPELINE= … reach the scripts because make puts its command-line variables into the recipes' environment;
# no recipe expands them into a shell line.
$(if $(filter from=% to=% pipeline=% only=% table=%,$(MAKEOVERRIDES)),$(error variables are in capitals: FROM=… TO=… PIPELINE=…))

.PHONY: help
help: ## Print this list
	@awk -F ':.*## ' '/^# [A-Z][a-z ]+$$/ { printf "\n%s\n", substr($$0, 3) } /^[a-z0-9_-]+:.*## / { printf "  make %-20s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# npm ci empties node_modules first, also through a link.
node_modules/.package-lock.json: package-lock.json
	@if [ -L node_modules ]; then echo "setup: node_modules is a link: run npm ci where it points to" >&2; exit 2; fi
	@echo "setup: npm ci (Node 24 and the libraries of package-lock.json)" >&2
	@npm ci --no-audit --no-fund --loglevel=error >&2
	@touch $@

.PHONY: setup
setup: node_modules/.package-lock.json

# The pipelines

.PHONY: orders
orders: setup ## Sync orders to BigQuery (FROM= TO= reads a window again)
	@node scripts/orders.ts

.PHONY: users
users: setup ## Sync users to BigQuery (FROM= TO= reads a window again)
	@node scripts/users.ts

.PHONY: events
events: setup ## Archive every complete day of events since the watermark to S3
	@node scripts/events.ts

.PHONY: sensors
sensors: setup ## Consume the sensors' topic into ClickHouse until stopped (UNTIL=caught-up)
	@node scripts/sensors.ts

.PHONY: views
views: setup ## Build, check and publish the models of views/ (ONLY= ALLOW_STALE=1 ALLOW_SHRINK=1)
	@node scripts/views.ts

# Operations

.PHONY: status
status: setup ## Where each pipeline is (JSON=1 for programs)
	@node scripts/ops/status.ts

.PHONY: report
report: setup ## Write one page for the half hour a week: state, runs, archive, models, proofs, cost (OUT=report.html)
	@node scripts/ops/report.ts

.PHONY: doctor
doctor: setup ## Check a set-up before its first run; say what to fix (PIPELINE= for one)
	@node scripts/ops/doctor.ts

.PHONY: rewind
rewind: setup ## Set a watermark back: PIPELINE= TO= (DRY_RUN=1 says what would be read again)
	@node scripts/ops/rewind.ts

.PHONY: verify
verify: setup ## Prove that source and destination agree (PIPELINE= for one; REPAIR=1 repairs what differs)
	@node scripts/ops/verify.ts

.PHONY: sweep
sweep: setup ## Remove at the destination what was deleted at the source (PIPELINE= for one; DRY_RUN=1 CONFIRM=1)
	@node scripts/ops/sweep.ts

.PHONY: backfill-events
backfill-events: setup ## Archive the days of FROM= TO= (CONCURRENCY= MAX_ROWS_PER_SECOND= FORCE=1)
	@node scripts/ops/backfill-events.ts

.PHONY: verify-events
verify-events: setup ## Read the archive back, compare it with manifests and source (the last eight days, or FROM= TO=; CLEAN=1)
	@node scripts/ops/verify-events.ts

.PHONY: restore-events
restore-events: setup ## Restore archived days into etl.events_restored: FROM= TO=
	@node scripts/ops/restore-events.ts

.PHONY: new-pipeline
new-pipeline: setup ## Write a pipeline from a table to BigQuery: TABLE= EVERY=1d (NAME= CURSOR= KEY= DRY_RUN=1)
	@node scripts/ops/new-pipeline.ts

.PHONY: new-column
new-column: setup ## Sync a column that the contract does not have: PIPELINE= COLUMN= (DRY_RUN=1)
	@node scripts/ops/new-column.ts

.PHONY: connector
connector: setup ## Register Debezium's connector with Kafka Connect, and wait until it runs
	@node scripts/ops/connector.ts

.PHONY: dead-letters
dead-letters: setup ## Messages of sensors that are not valid changes, and why (LIMIT=)
	@node scripts/ops/dead-letters.ts

.PHONY: replay-dead-letters
replay-dead-letters: setup ## Try the dead letters again
	@node scripts/ops/replay-dead-letters.ts

.PHONY: resnapshot
resnapshot: setup ## Rebuild sensor_readings from a fresh snapshot, beside the old one (scripts/README.md, "Rebuilding the table")
	@node scripts/ops/resnapshot.ts

.PHONY: swap-readings
swap-readings: setup ## Let readers see the rebuilt sensor_readings
	@node scripts/ops/swap-readings.ts

.PHONY: migrate
migrate: setup ## Create what is missing: tables, datasets, bucket (DRY_RUN=1 says what)
	@node scripts/ops/migrate.ts

# The local stack

.PHONY: demo
demo: setup ## Set up, start the local stack, run the pipelines on real data, print what happened
	@node test/demo.ts

.PHONY: up
up: setup ## Start the local stack: install what is missing into .stack/, load the real data
	@node test/stack/up.ts

.PHONY: down
down: setup ## Stop the local stack (its data stays)
	@node test/stack/down.ts

.PHONY: stack-status
stack-status: setup ## Which parts of the local stack run
	@node test/stack/status.ts

.PHONY: data
data: setup ## Load what is missing of the real data into the local source
	@node test/data/load.ts

# Development

.PHONY: test
test: setup ## Set up, run all the tests on the local stack (TESTS=orders, a folder of test/, or files)
	@node test/run.ts $${TESTS:-}

.PHONY: soak
soak: setup ## The tests at full size: 5M rows, longer campaigns (TESTS=orders, a folder of test/, or files)
	@SOAK=1 node test/run.ts $${TESTS:-}

.PHONY: chaos
chaos: setup ## All jobs under random faults on a separate stack, then compared (MINUTES= SEED=; BREAK= must fail)
	@node test/chaos.ts

.PHONY: check
check: setup ## Types, lint, unused code, SQL (Google's analyser, Postgres), alert rules
	@echo "check: types" >&2 && tsc -p .
	@echo "check: lint and format" >&2 && biome ci --colors=off --error-on-warnings .
	@echo "check: unused exports, files and dependencies" >&2 && knip --no-progress --treat-config-hints-as-errors
	@echo "check: layers; SQL, by Google's analyser, by Postgres and by ClickHouse" >&2; \
	  faults=0; for part in layers googlesql postgres clickhouse; do node test/check/$$part.ts || faults=1; done; exit $$faults
	@echo "check: alert rules" >&2 && node --test test/ops/alerts.test.ts

.PHONY: bench
bench: up ## Speed, as ratios measured side by side
	@for job in orders archive views sensors; do node test/bench/$$job.ts; done

.PHONY: bench-peers
bench-peers: up ## The same of orders and archive beside dlt, Sling and ingestr (sets them up in .stack/peers/)
	@for job in orders archive; do PEERS=1 node test/bench/$$job.ts; done

.PHONY: bench-lossless
bench-lossless: up ## Late commits, read by this project and its peers
	@node test/bench/lossless.ts

# The compiler knows what a file imports.
imported = tsc --ignoreConfig --listFilesOnly --noEmit --module nodenext --allowImportingTsExtensions $(1) | grep -v node_modules | sort

.PHONY: size
size: setup ## Lines to read: orders, the five jobs, the operations, each with what they import
	@printf 'orders, with what it imports      %5d lines\n' "$$($(call imported,scripts/orders.ts) | xargs cat | wc -l)"
	@printf 'the five jobs, with all imports   %5d lines\n' "$$($(call imported,scripts/*.ts) | xargs cat | wc -l)"
	@printf 'operations, and only their own    %5d lines\n' \
	  "$$(comm -13 <($(call imported,scripts/*.ts)) <($(call imported,scripts/ops/*.ts)) | xargs cat | wc -l)"
