"""Real servers for the tests: one module per server, found in the order address, Docker, binary."""
