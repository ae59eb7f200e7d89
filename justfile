# Everything a person does here. `just` alone lists it.

venv := env("VENV", justfile_directory() / ".venv")
python := venv / "bin/python"

[private]
default:
    @just --list --unsorted

# make or refresh the virtual environment
setup:
    @scripts/setup >/dev/null

# run the relay on an embedded PostgreSQL and NATS, with a summary at the end
demo *arguments:
    @scripts/demo {{ arguments }}

# environment, servers, checks and tests; arguments go to pytest
test *arguments:
    @scripts/test {{ arguments }}

# every backend under load for so many seconds, while relays and servers are killed at random
soak seconds="1800":
    @PGTRICKLE_SOAK_SECONDS={{ seconds }} scripts/test tests/soak -s -n 0

# format, lint, types, import floors, SQL style, version agreement
check:
    @scripts/check

# format the code and repair what the linter can repair
fmt: setup
    {{ venv }}/bin/ruff check --quiet --fix .
    {{ venv }}/bin/ruff format .
    -{{ python }} scripts/lint_sql.py --fix

# measure throughput and latency against their targets
bench *arguments: setup
    @scripts/bench {{ arguments }}

# write the parts of the documentation that are generated
docs: setup
    {{ python }} scripts/docs.py

# lock the dependencies of the image, the executables and the formula; --upgrade: the newest
lock *arguments: setup
    {{ python }} scripts/lock.py {{ arguments }}

# draw the picture of the README from the demo's real screen
picture: setup
    PYTHONPATH=. {{ python }} scripts/picture.py

# bring the database of PGTRICKLE_RELAY_POSTGRES_URL up to date
migrate *arguments: setup
    {{ python }} -m relay migrate {{ arguments }}

# fail when the places that state the version disagree
check-version-sync: setup
    {{ python }} scripts/check_version_sync.py
