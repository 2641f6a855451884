"""Writes the page: one HTML file, with or without a folder of pictures beside it."""

import json
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Asset:
    """What an image needs only when it is opened, as WebP.

    Attributes:
        picture: The image.
        heat_map: Grey levels of its anomaly map.
        mask: The true mask, if there is one.
    """

    picture: bytes
    heat_map: bytes
    mask: bytes | None


class PageFolder:
    """Where a page and its pictures go.

    Args:
        page: The HTML file.
        embed: Whether it holds all pictures itself. Otherwise those of the opened view lie in a folder beside it.
    """

    def __init__(self, page: Path, embed: bool = False) -> None:
        self.page = page
        self.embed = embed
        self.files = page.with_name(f"{page.stem}_files")
        for old in (*self.files.glob("[0-9]*.webp"), *self.files.glob("[0-9]*.js")):  # an earlier inspection's
            old.unlink()
        (page.parent if embed else self.files).mkdir(parents=True, exist_ok=True)

    def add(self, index: int, asset: Asset) -> dict[str, str]:
        """Save an image's pictures.

        A page that is opened from the disk may show pictures beside it, but not read their pixels; so the maps, which
        it colours itself, are scripts that hand them over.

        Args:
            index: The image's place.
            asset: Its pictures.

        Returns:
            What the page is told: where the pictures are, or the pictures.
        """
        maps = {"map": data_uri(asset.heat_map)}
        if asset.mask is not None:
            maps["mask"] = data_uri(asset.mask)
        if self.embed:
            return {"picture": data_uri(asset.picture), **maps}
        picture, script = self.files / f"{index:06}.webp", self.files / f"{index:06}.js"
        picture.write_bytes(asset.picture)
        script.write_text(f"heatMap({index}, {', '.join(json.dumps(each) for each in maps.values())});\n", "ascii")
        return {"picture": self._address(picture), "map_file": self._address(script)}

    def _address(self, path: Path) -> str:
        return quote(path.relative_to(self.page.parent).as_posix())

    def write(self, **data: Any) -> None:  # noqa: ANN401 - plain data, as in JSON
        """Write the page.

        Args:
            **data: What it shows; see ``page.html.jinja`` and the scripts beside it.
        """
        palette = mpl.colormaps[_COLOURS].resampled(LEVELS + 1)
        data["colours"] = [to_hex(palette(level))[1:] for level in range(LEVELS + 1)]
        template = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True).from_string(
            _text("page.html.jinja")
        )
        html = template.render(
            data=data, style=_Trusted(_text("page.css")), scripts=map(_Trusted, map(_text, _SCRIPTS))
        )
        self.page.write_text(html, encoding="utf-8")


class _Trusted(str):
    """Text of this package, which the template does not escape."""

    __slots__ = ()

    def __html__(self) -> str:
        return self


@cache
def _text(name: str) -> str:
    return (files("anomalib_cfa.inspect") / name).read_text(encoding="utf-8")
