"""One suite for sinks and one for sources, run over the in-memory pair and every backend."""

import pytest

pytest.register_assert_rewrite(
    "tests.contract.evidence", "tests.contract.sink_contract", "tests.contract.source_contract"
)
