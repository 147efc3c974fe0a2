"""Convert pixels of any mode to 8-bit grey or RGB: transparency on white, 16 bits scaled and not clipped."""

from __future__ import annotations

import numpy as np
from PIL import Image


def to_8_bit(image: Image.Image) -> Image.Image:
    """Return an image of any mode as 8-bit L or RGB, with transparency composed on white."""
    if image.mode[0] in "IF":
        values = np.asarray(image)
        grey = scale_to_uint8(values)
        key = image.info.get("transparency")
        return Image.fromarray(np.where(values == key, np.uint8(255), grey) if isinstance(key, int) else grey)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        page = Image.new("RGB", rgba.size, "white")
        page.paste(rgba, mask=rgba.getchannel("A"))
        return page
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


def scale_to_uint8(values: np.ndarray) -> np.ndarray:
    """Scale grey values to 0..255: from a nominal range if they fit in one, else from their minimum and maximum.

    Nominal is 0..65535 for integers and, in this order, 0..1 and 0..255 for floats; non-finite becomes the minimum.
    """
    tops = (1.0, 255.0) if values.dtype.kind == "f" else (65535.0,)
    values = values.astype(np.float32)
    finite = np.isfinite(values)
    low, high = 0.0, 0.0
    if finite.any():
        low = float(values.min(where=finite, initial=np.inf))
        high = float(values.max(where=finite, initial=-np.inf))
    for top in tops:
        if low >= 0 and high <= top:
            low, high = 0.0, top
            break
    scaled = (np.where(finite, values, low) - low) * (255 / max(high - low, 1e-30))
    return np.rint(scaled).astype(np.uint8)
