"""``python -m relay`` is ``pgtrickle-relay``."""

from relay.cli import main

main()
