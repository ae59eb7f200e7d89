"""A relay whose renderer fails as soon as a file is there.

`python -m tests.status.failing_relay FILE ARGUMENTS`: the arguments are the relay's.
"""

from __future__ import annotations

import sys
from pathlib import Path

from rich.text import Text

from relay.cli import main
from relay.status.screen import Renderer, Scene


class FailingRenderer(Renderer):
    """The real one until the file is there."""

    trigger = Path(sys.argv[1])

    def draw(self, scene: Scene, width: int, height: int) -> list[Text]:
        if self.trigger.exists():
            raise RuntimeError("the renderer fails as asked")
        return super().draw(scene, width, height)


if __name__ == "__main__":
    import relay.status.view

    relay.status.view.Renderer = FailingRenderer  # type: ignore[misc]
    main(sys.argv[2:])
