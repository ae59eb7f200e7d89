"""Tests of the relay. Real servers come from `tests.servers`."""
