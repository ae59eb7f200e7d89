"""The picture of the README is what the view draws now."""

from __future__ import annotations

import html
import re

import msgspec
from rich.color import ColorSystem

from relay.demo.run import KEYS
from relay.status.screen import Renderer
from scripts.picture import COLUMNS, LINES, PICTURE
from tests.status.scene import scene


def test_the_picture_of_the_readme_has_the_columns_and_the_keys_of_today() -> None:
    demo = msgspec.structs.replace(scene(), keys=KEYS, stops_relay=True)
    renderer = Renderer(colours=ColorSystem.STANDARD, is_unicode=True)
    *_, bottom = drawn = [line.plain.split() for line in renderer.draw(demo, COLUMNS, LINES)]
    (titles,) = [line for line in drawn if "route" in line]

    texts = re.findall(r"<text [^>]*>(.*?)</text>", PICTURE.read_text(encoding="utf-8"))
    pictured = html.unescape(" ".join(texts)).split()

    for words in (titles, bottom):
        first = pictured.index(words[0])
        assert pictured[first : first + len(words)] == words, "run just picture"
