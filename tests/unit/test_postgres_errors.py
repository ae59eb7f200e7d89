"""What PostgreSQL's driver says, without what it quotes."""

from __future__ import annotations

import asyncpg
import pytest

from relay.errors import MessageRejected
from relay.postgres import postgres_errors


def test_the_argument_that_the_driver_quotes_is_not_repeated() -> None:
    quoting = asyncpg.DataError(
        "invalid input for query argument $1: 'card 4111' (expected a number: x)"
    )

    with pytest.raises(MessageRejected) as caught, postgres_errors("writing"):
        raise quoting

    assert "query argument $1" in str(caught.value)
    assert "4111" not in str(caught.value)
