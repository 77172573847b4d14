"""Noto Color Emoji as pictures with their Unicode names: small, varied, and every one has a caption."""

from __future__ import annotations

import unicodedata
from pathlib import Path

from .catalogue import DataError
from .images import fetch_debian
from .movielens import default_cache_dir

DEBIAN_PACKAGE = "fonts-noto-color-emoji"
INSTALLED = Path("/usr/share/fonts/truetype/noto")
FONT = "NotoColorEmoji.ttf"


def emoji(cache_dir=None) -> tuple[list[bytes], list[str]]:
    """Noto Color Emoji: PNG files of 136 x 128 pixels as bytes, and the lower-case Unicode name of each, in the order
    of the code points. 1,405 of them with Debian 12's font.

    Only emoji of a single code point have a name; flags, skin tones and families, which are sequences, are left out.
    Read from Debian's package fonts-noto-color-emoji (SIL Open Font Licence): where it is installed, else from
    ``cache_dir`` (default ``~/.cache/vqkernels``), where the first call puts it with apt-get, no root needed.
    DataError says how to get it elsewhere.
    """
    path = INSTALLED / FONT
    if not path.is_file():
        path = Path(cache_dir or default_cache_dir()) / "emoji" / FONT
        if not path.is_file():
            how = f"On Debian or Ubuntu run 'apt-get install {DEBIAN_PACKAGE}'; elsewhere put {FONT} into {path.parent}"
            fetch_debian(DEBIAN_PACKAGE, INSTALLED, FONT, path.parent, "Noto Color Emoji", how)
    return _read_font(path)


def _read_font(path: Path) -> tuple[list[bytes], list[str]]:
    try:
        from fontTools.ttLib import TTFont, TTLibError
    except ImportError:
        raise ImportError("emoji are read with fontTools. Run: pip install 'vqkernels[images]'") from None
    try:
        font = TTFont(path)
        glyphs, bitmaps = font.getBestCmap(), font["CBDT"].strikeData[0]
    except (TTLibError, KeyError, OSError, AssertionError) as error:
        raise DataError(
            f"{path}: not a font with colour bitmaps (table CBDT): {error!r}. Remove it and run again to fetch it"
        ) from None
    pictures, names = [], []
    for point, glyph in sorted(glyphs.items()):
        name = unicodedata.name(chr(point), None)
        if name and glyph in bitmaps:
            pictures.append(bitmaps[glyph].imageData)
            names.append(name.lower())
    return pictures, names
