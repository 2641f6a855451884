"""Writes the page: one HTML file, with or without a folder of pictures beside it."""

import hashlib
import json
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

import matplotlib as mpl
from jinja2 import Environment, StrictUndefined
from matplotlib.colors import to_hex

from anomalib_cfa.inspect.pictures import LEVELS, data_uri

_COLOURS = "inferno"  # perceptually uniform, and read alike by the colour-blind
_SCRIPTS = ("judge.js", "viewer.js", "page.js", "start.js")


class PageFolder:
    """Where a page and its pictures go.

    An earlier inspection's page and pictures stay as they are until :meth:`write`, which also removes what one that
    failed has left.

    Args:
        page: The HTML file.
        embed: Whether it holds all pictures itself. Otherwise those of the opened view lie in a folder beside it.
    """

    def __init__(self, page: Path, embed: bool = False) -> None:
        self.page = page
        self.embed = embed
        self.files = page.with_name(f"{page.stem}_files")
        self._saved: set[Path] = set()
        if page.is_dir():
            msg = f"output must be the path of a page, but is the folder {str(page)!r}"
            raise ValueError(msg)
        (page.parent if embed else self.files).mkdir(parents=True, exist_ok=True)
        is_new = not page.exists()
        page.open("ab").close()  # raises now what would be raised after all images
        if is_new:
            page.unlink()

    def add(self, index: int, picture: bytes, heat_map: bytes, mask: bytes | None) -> dict[str, str]:
        """Save what an image needs only when it is opened, encoded as WebP, and return what the page is told of it.

        A page that is opened from the disk may show pictures beside it, but not read their pixels; so the maps, which
        it colours itself, are scripts that hand them over.
        """
        maps = {"map": data_uri(heat_map)}
        if mask is not None:
            maps["mask"] = data_uri(mask)
        if self.embed:
            return {"picture": data_uri(picture), **maps}
        script = f"heatMap({index}, {', '.join(json.dumps(each) for each in maps.values())});\n"
        return {
            "picture": self._save(index, "webp", picture),
            "map_file": self._save(index, "js", script.encode("ascii")),
        }

    def _save(self, index: int, suffix: str, content: bytes) -> str:
        """Save a file, and return its address. A file of an earlier inspection has its name only if it is the same."""
        path = self.files / f"{index:06}-{hashlib.sha256(content).hexdigest()[:12]}.{suffix}"
        path.write_bytes(content)
        self._saved.add(path)
        return quote(path.relative_to(self.page.parent).as_posix())

    def write(self, **data: Any) -> None:  # plain data, as in JSON
        """Write the page of this data, see ``page.html.jinja``, and remove the pictures of an earlier one."""
        palette = mpl.colormaps[_COLOURS].resampled(LEVELS + 1)
        data["colours"] = [to_hex(palette(level))[1:] for level in range(LEVELS + 1)]
        template = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True).from_string(
            _text("page.html.jinja")
        )
        html = template.render(data=data, style=_text("page.css"), scripts=map(_text, _SCRIPTS))
        # A file's name need not be text.
        self.page.write_text(html, encoding="utf-8", errors="backslashreplace")
        for path in {*self.files.glob("[0-9]*.webp"), *self.files.glob("[0-9]*.js")} - self._saved:
            path.unlink()


@cache
def _text(name: str) -> str:
    return (files("anomalib_cfa.inspect") / name).read_text(encoding="utf-8")
