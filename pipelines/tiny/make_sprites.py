"""Draws ``sprites.png`` from the npm package ``@iconify-json/noto``.

npm pack @iconify-json/noto && tar xzf iconify-json-noto-*.tgz && pip install resvg-py
python -m dit_accel.pipelines.tiny.make_sprites package/icons.json
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

from PIL import Image

from .sprites import COLUMNS, OBJECTS, SHEET, SIDE


def main(icons: Path) -> None:
    """Writes the sheet of the objects' drawings in ``icons``, an Iconify collection."""
    import resvg_py  # pyright: ignore[reportMissingImports]

    drawings = json.loads(icons.read_text())["icons"]
    rows = -(-len(OBJECTS) // COLUMNS)
    sheet = Image.new("RGBA", (COLUMNS * SIDE, rows * SIDE))
    for index, name in enumerate(OBJECTS.values()):
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="0 0 128 128">{drawings[name]["body"]}</svg>'
        )
        drawn = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=SIDE, height=SIDE))
        row, column = divmod(index, COLUMNS)
        sheet.paste(Image.open(io.BytesIO(drawn)), (column * SIDE, row * SIDE))
    sheet.save(SHEET, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
