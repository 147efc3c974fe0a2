"""Translate preprocessing from and to `preprocessor_config.json`, the settings of transformers' image processors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from vitrail.data.images.preprocess import Preprocess, crop_fraction_of
from vitrail.lookup import pick, unknown

_HALF = (0.5, 0.5, 0.5)
_CLIP = {"image_mean": (0.48145466, 0.4578275, 0.40821073), "image_std": (0.26862954, 0.26130258, 0.27577711)}
_STEPS = {"do_resize": True, "do_rescale": True, "do_normalize": True, "do_center_crop": False, "do_pad": False}
_CROPPED = {"crop_size": 224, "do_center_crop": True}
_SHORTEST = {**_STEPS, **_CLIP, **_CROPPED, "resample": 3, "size": {"shortest_edge": 224}, "default_to_square": False}

# Each processor's defaults for settings that its file does not give (transformers 5.23; older slow ones have the same).
PROCESSORS: dict[str, dict[str, Any]] = {
    "ViTImageProcessor": {**_STEPS, "resample": 2, "image_mean": _HALF, "image_std": _HALF, "size": 224},
    "DeiTImageProcessor": {
        **_STEPS,
        **_CROPPED,
        "resample": 3,
        "image_mean": _HALF,
        "image_std": _HALF,
        "size": 256,
    },
    "BitImageProcessor": _SHORTEST,
    "CLIPImageProcessor": _SHORTEST,
    "DINOv3ViTImageProcessor": {
        **_STEPS,
        "resample": 2,
        "image_mean": (0.485, 0.456, 0.406),
        "image_std": (0.229, 0.224, 0.225),
        "size": 224,
    },
}
FRACTIONS = ("DINOv3ViTImageProcessor",)  # resize after rescaling to floats, without rounding
RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}  # Pillow's numbers
_KNOWN = {*_STEPS, *_CROPPED, "resample", "image_mean", "image_std", "size", "default_to_square", "rescale_factor"}
_KNOWN |= {"do_convert_rgb", "image_processor_type", "feature_extractor_type"}


def image_processor_class(settings: Mapping[str, Any], default: str) -> str:
    """Return the class name of a file's image processor; one that ends in Fast resizes with torchvision."""
    name = settings.get("image_processor_type") or settings.get("feature_extractor_type") or default
    return str(name).replace("FeatureExtractor", "ImageProcessor").removesuffix("Pil")


def from_processor(settings: Mapping[str, Any], default: str, channels: int) -> tuple[Preprocess, list[str]]:
    """Return the preprocessing of a `preprocessor_config.json`, and the names of its settings that have no meaning here.

    Raises:
        ValueError: the processor is unknown, or does something that cannot be done here.
    """
    full_name = image_processor_class(settings, default)
    name = full_name.removesuffix("Fast")
    if name not in PROCESSORS:
        raise ValueError(f"{unknown('image processor', name, PROCESSORS)}; describe its preprocessing instead")
    given = {key: value for key, value in settings.items() if value is not None}
    own = {**PROCESSORS[name], **given}
    for step in sorted(own):
        if step.startswith("do_") and step not in _KNOWN and own[step]:
            raise ValueError(f"{step} is {own[step]!r}, a step that is unknown here")
    if own["do_pad"]:
        raise ValueError("do_pad is true; images are resized and cropped here, never padded")
    if not own["do_resize"]:
        raise ValueError("do_resize is false, so that images must come in the model's size; set it, or describe one")
    size, resize, fraction = _sides(own)
    mean, std = _levels(own, channels)
    filters = {number: name for name, number in RESAMPLE.items()}
    if own["resample"] not in filters:
        raise ValueError(f"resample is {own['resample']!r}; expected one of Pillow's, {filters}")
    preprocess = Preprocess(
        image_size=size,
        channels=channels,
        resize=resize,
        crop_fraction=fraction,
        crop_offset="down",
        interpolation=filters[own["resample"]],
        resampler="fractions" if name in FRACTIONS else "torchvision" if full_name != name else "pillow",
        mean=mean,
        std=std,
    )
    return preprocess, sorted(key for key in given if key not in _KNOWN and not key.startswith(("_", "do_")))


def to_processor(preprocess: Preprocess) -> tuple[dict[str, Any], list[str]]:
    """Return the content of a `preprocessor_config.json`, and notes on what it cannot express exactly.

    Raises:
        ValueError: no image processor does such a preprocessing.
    """
    if preprocess.resize == "aspect":
        raise ValueError(
            "preprocessing 'aspect' keeps whole images in their own aspect ratio, which no image processor of transformers "
            "does; train with, or choose, preprocess.resize crop or squash"
        )
    size, short = preprocess.image_size, int(preprocess.image_size / preprocess.crop_fraction)
    short = max(size, short) if "crop" in preprocess.resize else size
    cropped = {"do_center_crop": True, "crop_size": {"height": size, "width": size}}
    by_resize = {
        "squash": ("ViTImageProcessor", {"size": {"height": size, "width": size}}),
        "squash_crop": ("DeiTImageProcessor", {"size": {"height": short, "width": short}, **cropped}),
        "crop": ("BitImageProcessor", {"size": {"shortest_edge": short}, **cropped}),
    }
    name, sides = pick(by_resize, preprocess.resize, "preprocess.resize")
    by_resampler = {"pillow": name, "torchvision": f"{name}Fast", "fractions": FRACTIONS[0]}
    settings = {
        "image_processor_type": by_resampler[preprocess.resampler],
        "do_resize": True,
        "resample": RESAMPLE[preprocess.interpolation],
        **sides,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess.mean),
        "image_std": list(preprocess.std),
        "do_convert_rgb": preprocess.channels == 3,  # BitImageProcessor makes grey images colour where this is unsaid
    }
    notes = []
    if preprocess.channels == 1:
        notes.append(
            'its images are grey, and image processors of transformers make none so: open them as mode L, image.convert("L")'
        )
    if preprocess.resampler == "pillow":
        notes.append(
            "transformers 5 resizes with torchvision unless told otherwise, which moves up to an eighth of the pixel values by one "
            'level of 255; AutoImageProcessor.from_pretrained(…, backend="pil") gives the very pixels'
        )
    if preprocess.crop_offset != "down" and (preprocess.resize == "crop" or (short - size) % 2):
        notes.append(
            "transformers begins a centre crop half a pixel earlier where it cannot lie in the middle: images of which an "
            "odd number of pixels is cut off are seen one pixel beside, and answers can change; train with "
            "--preprocess.crop_offset down for the very same crop"
        )
    return settings, notes


def _sides(own: Mapping[str, Any]) -> tuple[int, str, float]:
    """Return the side of the result, the kind of resizing, and the fraction that a crop keeps."""
    size = _size(own, "size", square=own.get("default_to_square", True))
    if set(size) not in ({"height", "width"}, {"shortest_edge"}):
        raise ValueError(f"size is {own['size']!r}; expected height and width, or shortest_edge alone")
    if not own["do_center_crop"]:
        if "shortest_edge" in size:
            raise ValueError(
                "shortest_edge without a centre crop gives images of every aspect ratio; this reads squares, so set "
                "do_center_crop and crop_size, or a size of height and width"
            )
        return _side(size, "size"), "squash", 1.0
    side = _side(_size(own, "crop_size", square=True), "crop_size")
    short = size["shortest_edge"] if "shortest_edge" in size else _side(size, "size")
    if short < side:
        raise ValueError(f"crop_size {side} is larger than size {short}, so that images would get a black border")
    return side, "crop" if "shortest_edge" in size else "squash_crop", crop_fraction_of(side, short)


def _size(own: Mapping[str, Any], key: str, *, square: bool) -> dict[str, int]:
    """Return a size as a mapping of sides; older files have a number, or a pair of height and width."""
    value = own[key]
    if isinstance(value, int) and not isinstance(value, bool):
        value = {"height": value, "width": value} if square else {"shortest_edge": value}
    elif isinstance(value, (list, tuple)) and len(value) == 2:
        value = {"height": value[0], "width": value[1]}
    if not isinstance(value, Mapping):
        raise ValueError(f"{key} is {value!r}; expected a number of pixels, or a mapping")
    sides = {name: number for name, number in value.items() if number is not None}
    if not all(type(number) is int and 1 <= number <= 16384 for number in sides.values()):
        raise ValueError(f"{key} is {value!r}; expected pixels, 1 to 16384")
    return sides


def _side(size: Mapping[str, int], key: str) -> int:
    if set(size) != {"height", "width"} or size["height"] != size["width"]:
        raise ValueError(f"{key} is {dict(size)}; expected a square, as this model's input has one side")
    return size["height"]


def _levels(own: Mapping[str, Any], channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and standard deviation for pixels in 0 to 1, whatever factor the processor scales pixels by."""
    factor = own.get("rescale_factor", 1 / 255) if own["do_rescale"] else 1.0
    if not isinstance(factor, (int, float)) or isinstance(factor, bool) or not 0 < factor < math.inf:
        raise ValueError(f"rescale_factor is {factor!r}; expected a number above 0")
    scale = 1.0 if math.isclose(factor, 1 / 255, rel_tol=1e-6) else 1 / (255 * factor)
    found = []
    for key, neutral in (("image_mean", 0.0), ("image_std", 1.0)):
        values = own[key] if own["do_normalize"] else neutral
        values = [values] * channels if isinstance(values, (int, float)) else values
        if not isinstance(values, (list, tuple)) or not all(isinstance(value, (int, float)) for value in values):
            raise ValueError(f"{key} is {values!r}; expected {channels} numbers")
        values = list(values) * channels if len(values) == 1 else values
        if len(values) != channels or not all(math.isfinite(value) for value in values):
            raise ValueError(f"{key} is {values!r}; expected {channels} numbers, one per channel of the model")
        found.append(tuple(float(value) * scale for value in values))
    return found[0], found[1]
