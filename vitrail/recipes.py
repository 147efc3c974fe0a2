"""Recipes: named, complete training configurations. `auto`, the default, is chosen from the data and the machine.

A recipe is a function of the facts and of what the user has fixed already; it returns settings with a reason each.
What the user fixes is never changed, and what depends on it follows it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from vitrail.config import UNEVEN, RunConfig, load_config
from vitrail.config_schema import at_least, leaves, override
from vitrail.lookup import pick
from vitrail.models.config import ENCODER_NAMES
from vitrail.models.variants import SIZES, suffix_fields, variant_config

if TYPE_CHECKING:
    from vitrail.weights.model_file import ModelHeader


@dataclass(frozen=True)
class Facts:
    """What a recipe may look at.

    Attributes:
        num_train: images in the training split.
        num_classes: labels.
        side: median short side of the images, pixels.
        uniform: whether all images have one size.
        channels: 1 when all images are grey, else 3.
        flip_reason: why images must not be mirrored; empty when they may.
        device: cpu or cuda.
        bf16: whether the device computes bfloat16 on its own instructions.
        class_sizes: images in the smallest and in the largest class of the training split.
    """

    num_train: int
    num_classes: int
    side: int
    uniform: bool
    channels: int
    flip_reason: str
    device: str
    bf16: bool
    class_sizes: tuple[int, int] = (1, 1)


@dataclass(frozen=True)
class Choice:
    """One setting that a recipe made, and why."""

    setting: str
    value: Any
    reason: str


def build_config(
    recipe: str, facts: Facts, given: Mapping[str, Any], source: ModelHeader | None = None
) -> tuple[RunConfig, list[Choice]]:
    """Return the resolved configuration of a run and the recipe's choices.

    Args:
        recipe: a recipe's name, or the path of an earlier run's config.json.
        given: what the user has fixed: dotted settings, and `variant` or `pretrained`.
        source: what the weights that the run starts from say of themselves.

    Raises:
        ValueError: the recipe is unknown, or a setting is unknown or refused.
    """
    for name in ("batch_size", "model.patch_size", "model.image_size"):
        at_least(name, given.get(name, 1), 1)
    for size in given.get("model.patch_sizes", ()):
        at_least("model.patch_sizes", size, 1)
    if given.get("epochs", 1) <= 0:
        raise ValueError(f"epochs is {given['epochs']}; expected above 0")
    new_encoder = "variant" in given or "model.encoder" in given or "encoder_weights" in given
    if (config := recipe_file(recipe)) is not None:
        choices = [Choice(name, value, f"from {recipe}") for name, value in leaves(config)]
        fixed = {"recipe", "data.source", "model.num_classes"}
        if "variant" in given or "pretrained" in given:  # another architecture: only what the images decide stays
            fixed |= {name for name, _ in leaves(config) if name.startswith("model.") and name != "model.in_channels"}
        if dropped := earlier(given):
            fixed |= dropped.keys()
            config = override(config, dropped)
    else:
        config, choices, fixed = RunConfig(), chosen(recipe, facts, given, source), set[str]()
    # What the model's name says is as good as given.
    named = {f"model.{field}" for field in suffix_fields(str(given.get("variant", "")))}
    choices = [choice for choice in choices if choice.setting not in {*given, *fixed, *named}]
    made = {choice.setting: choice.value for choice in choices}
    if source is None:
        variant = str({**made, **given}.get("variant", config.variant))
        wanted = {f"model.{key}": value for key, value in leaves(variant_config(variant))}
    elif recipe in RECIPES or "pretrained" in given:
        from vitrail.finetuning import keep_source

        wanted, choices = keep_source(choices, facts, given, source)
        choices = [choice for choice in choices if choice.setting not in given]
        made = {choice.setting: choice.value for choice in choices}
    else:  # the file says all of it
        wanted = {}
    wanted |= {**made, **given, "recipe": recipe, "model.num_classes": facts.num_classes}
    config = override(config, wanted)
    if config.encoder_weights and (new_encoder or recipe in RECIPES):  # else the earlier run's own normalisation stands
        config, choices = as_published(config, choices, given)
    refuse_idle(config, given)
    return config, choices


def chosen(recipe: str, facts: Facts, given: Mapping[str, Any], source: ModelHeader | None) -> list[Choice]:
    """Return the choices of a named recipe; `auto` has others for trained weights.

    Raises:
        ValueError: there is no such recipe.
    """
    if recipe == "auto" and source is not None:
        from vitrail import finetuning

        return finetuning.auto(facts, given, source)
    return pick(RECIPES, recipe, "recipe")(facts, given)


def earlier(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of an earlier run's file names parts and files of an architecture that was replaced, and its resets."""
    dropped: dict[str, Any] = {}
    if "variant" in given or "pretrained" in given or "model.encoder" in given:
        dropped |= {"encoder_weights": "", "optim.freeze": ()}
    if "variant" in given:
        dropped |= {"pretrained": "", "optim.head_warmup": "0 steps", "lora.rank": 0}
    return dropped


def as_published(config: RunConfig, choices: list[Choice], given: Mapping[str, Any]) -> tuple[RunConfig, list[Choice]]:
    """Give trained weights the normalisation that they were trained with, whatever the recipe says of others.

    Raises:
        ValueError: the user fixed one of mean and std, which would mix two normalisations.
    """
    from vitrail.models.cnns import normalisation

    names = ("preprocess.mean", "preprocess.std")
    if sum(name in given for name in names) == 1:
        raise ValueError("preprocess.mean and preprocess.std belong together; give both, or none for the encoder's own")
    if names[0] in given:
        return config, choices
    channels = config.model.in_channels
    values = [each if channels == 3 else (fmean(each),) for each in normalisation(config.model.encoder)]
    made = [
        Choice(name, value, f"as {config.model.encoder}'s weights expect")
        for name, value in zip(names, values, strict=True)
    ]
    others = [choice for choice in choices if choice.setting not in names]
    return override(config, {choice.setting: choice.value for choice in made}), [*others, *made]


def recipe_file(recipe: str) -> RunConfig | None:
    """Return the configuration of an earlier run that a recipe names, or None when it names a recipe.

    Raises:
        ValueError: the file is missing or cannot be read.
    """
    if not recipe.endswith(".json") and "/" not in recipe:
        return None
    if not Path(recipe).is_file():
        raise ValueError(f"recipe {recipe}: no such file; expected a config.json of an earlier run, or a recipe's name")
    return load_config(Path(recipe))


# Setting → (setting that it depends on, whether it has an effect under this configuration).
IDLE: dict[str, tuple[str, Callable[[RunConfig], bool]]] = {
    "schedule.step_every": ("schedule.decay", lambda config: config.schedule.decay == "step"),
    "schedule.step_gamma": ("schedule.decay", lambda config: config.schedule.decay == "step"),
    "schedule.final_fraction": ("schedule.decay", lambda config: config.schedule.decay in ("cosine", "linear")),
    "optim.effective_beta": ("optim.class_weights", lambda config: config.optim.class_weights == "effective"),
    "data.val_fraction": ("data.folds", lambda config: config.data.folds == 0),
    "lora.alpha": ("lora.rank", lambda config: config.lora.rank > 0),
    "lora.targets": ("lora.rank", lambda config: config.lora.rank > 0),
    "data.cache_bytes": ("data.cache_side", lambda config: config.data.cache_side > 0),
    "data.decode": (
        "augment.crop_scale",
        lambda config: config.data.decode == "exact" or config.augment.crop_scale < 1,
    ),
    "preprocess.crop_fraction": ("preprocess.resize", lambda config: "crop" in config.preprocess.resize),
    "preprocess.crop_offset": ("preprocess.resize", lambda config: "crop" in config.preprocess.resize),
    "augment.crop_ratio": ("augment.crop_scale", lambda config: config.augment.crop_scale < 1),
    "augment.saturation": ("model.in_channels", lambda config: config.model.in_channels == 3),
    "augment.fill": ("augment.rotation", lambda config: config.augment.rotation > 0 or config.augment.shift > 0),
    "augment.policy_ops": ("augment.policy", lambda config: config.augment.policy == "randaugment"),
    "augment.policy_magnitude": ("augment.policy", lambda config: config.augment.policy == "randaugment"),
    "augment.erasing_fill": ("augment.erasing", lambda config: config.augment.erasing > 0),
    "augment.mix_chance": ("augment.mixup", lambda config: config.augment.mixes),
}


def refuse_idle(config: RunConfig, given: Mapping[str, Any]) -> None:
    """Raise a ValueError when the user sets something that has no effect: nothing is ignored silently."""
    values = dict(leaves(config))
    for name, (other, has_effect) in IDLE.items():
        if given.get(name) and not has_effect(config):
            raise ValueError(
                f"{name} {given[name]!r} has no effect with {other} {values[other]!r}; leave it out or change that"
            )


def auto(facts: Facts, given: Mapping[str, Any]) -> list[Choice]:
    """Choose for any dataset of class folders: a ViT from scratch that fits its images, its size and this machine."""
    choices = architecture(facts, given)
    depth_of = {choice.setting: choice.value for choice in choices} | dict(given)
    choices += duration(facts, depth_of)
    choices += augmentation(facts)
    choices += sampling(facts, given, from_scratch=True)
    choices += reading(facts, depth_of)
    choices += speed(facts)
    return choices


def reading(facts: Facts, known: Mapping[str, Any]) -> list[Choice]:
    """Leave out of large JPEGs what the model's input has no room for."""
    size = int(known["model.image_size"])
    if facts.side < 2 * size or known.get("augment.crop_scale") == 1:
        return []
    why = f"a short side of {facts.side} px for a model of {size}: large JPEGs are decoded smaller; evaluation stays exact"
    return [Choice("data.decode", "fast", why)]


def sampling(facts: Facts, given: Mapping[str, Any], *, from_scratch: bool) -> list[Choice]:
    """Show rare classes more often where classes are uneven, unless the user corrects that in the loss.

    From trained weights they are left as they are, since nothing was measured there, and that is said.
    """
    if not is_uneven(facts) or given.get("optim.class_weights", "none") != "none":
        return []
    smallest, largest = facts.class_sizes
    uneven = f"classes have {smallest:,} to {largest:,} images"
    if not from_scratch:
        why = "left as they are, since nothing was measured from trained weights; sqrt shows rare ones more often"
        return [Choice("data.sampling", "natural", f"{uneven}, {why}")]
    why = "rare ones come more often; where it was measured, more of them were found, at about the same accuracy"
    return [Choice("data.sampling", "sqrt", f"{uneven}: {why}")]


def is_uneven(facts: Facts) -> bool:
    """Whether the classes of the training split differ so much in size that something has to be said."""
    smallest, largest = facts.class_sizes
    return largest >= UNEVEN * smallest


def speed(facts: Facts) -> list[Choice]:
    """Number format and compilation, where they pay."""
    if facts.device == "cuda":
        choices = [Choice("compile", True, "compiled training is faster on a GPU; the first steps take a minute")]
        if facts.bf16:
            choices.append(Choice("precision", "bf16", "this GPU computes bfloat16 several times faster"))
        return choices
    if facts.bf16 and facts.side > 16:
        return [Choice("precision", "bf16", "this CPU has bfloat16 instructions: nearly twice as fast as fp32")]
    reason = "too little work an image for bfloat16 to pay" if facts.bf16 else "this CPU has no bfloat16 instructions"
    return [Choice("precision", "fp32", reason)]


def architecture(facts: Facts, given: Mapping[str, Any]) -> list[Choice]:
    """Image size, patch size, width and depth."""
    side, patch, size = image_and_patch(facts)
    patch_sizes = tuple(given.get("model.patch_sizes", ()))
    if "variant" in given:
        variant = variant_config(str(given["variant"]))
        patch = int(given.get("model.patch_size", variant.patch_size))
        reason = f"the size of model {given['variant']}"
        size = variant.image_size
        unit = patch if "model.image_size" in given else common_multiple(patch, patch_sizes, facts.side)
        if facts.side < size or patch <= 8 or size % unit:
            size = max(1, round(max(min(facts.side, size) if patch > 8 else facts.side, unit) / unit)) * unit
            reason = f"the images' own {facts.side} px as a multiple of {unit}-px patches"
        size = int(given.get("model.image_size", size))
        return [Choice("model.image_size", size, reason), *fitting(facts, size, given)]
    if given.get("model.encoder") == "r50":
        patch = 16  # its finest stride
    if patch_sizes:
        patch = min(patch_sizes, key=lambda trained: abs(trained - patch))
    patch = int(given.get("model.patch_size", patch))
    unit = patch if "model.image_size" in given else common_multiple(patch, patch_sizes, size)
    size = int(given.get("model.image_size", max(1, round(size / unit)) * unit))
    return [
        Choice("variant", f"{body(facts)}{patch}", f"{facts.num_train:,} training images on a {facts.device.upper()}"),
        Choice("model.image_size", size, side),
        Choice("model.patch_size", patch, f"{(size // patch) ** 2} patches an image: fine enough, and cheap enough"),
        *fitting(facts, size, given),
    ]


def common_multiple(patch: int, patch_sizes: tuple[int, ...], side: int) -> int:
    """Return the smallest side that all patch sizes divide.

    Raises:
        ValueError: it is much larger than the images.
    """
    unit = math.lcm(patch, *patch_sizes)
    if unit > 2 * max(side, patch):
        raise ValueError(
            f"model.patch_sizes {' '.join(map(str, patch_sizes))}: the smallest image that patches of {patch} and these all "
            f"divide has {unit} px, but the images have about {side}; choose sizes that are multiples of each other"
        )
    return unit


def image_and_patch(facts: Facts) -> tuple[str, int, int]:
    """Return the reason, patch size and image size that suit the images."""
    if facts.side <= 48:
        patch = 4
    elif facts.side <= 160:
        patch = 8
    else:
        size = 224 if facts.device == "cuda" else 128
        why = "the usual size" if facts.device == "cuda" else "a third of the cost of 224 on a CPU"
        return f"images have a short side of {facts.side} px (median); {why}", 16, size
    size = max(patch * 2, round(facts.side / patch) * patch)
    return f"images have a short side of {facts.side} px (median)", patch, size


def body(facts: Facts) -> str:
    """Return the size letter: as large as the data and the device can feed."""
    if facts.device == "cpu":
        return "nano" if facts.num_train < 10_000 and facts.side <= 48 else "micro"
    return "ti" if facts.num_train < 100_000 else "s"


def fitting(facts: Facts, size: int, given: Mapping[str, Any]) -> list[Choice]:
    """How images are brought to the model's size, its first channels, and the decoder."""
    channels = int(given.get("model.in_channels", facts.channels))
    values = (0.5,) * channels
    named = suffix_fields(str(given.get("variant", "")))
    decoder = str(given.get("model.decoder", named.get("decoder", "mean")))
    encoder = str(given.get("model.encoder", named.get("encoder", "patch")))
    mean, std, reason = values, values, "the usual for ViTs"
    if encoder not in ENCODER_NAMES:
        from vitrail.models.cnns import normalisation

        mean, std = (each if channels == 3 else (fmean(each),) for each in normalisation(encoder))
        reason = f"as {encoder}'s published weights expect"
    choices = [
        Choice(
            "model.in_channels",
            channels,
            "no colour in a sample of the images" if channels == 1 else "colour images",
        ),
        Choice("model.decoder", decoder, "small sets learn it faster than a class token"),
        Choice(
            "model.class_token", decoder in ("token", "token_mean", "token_pair"), f"as the decoder {decoder!r} needs"
        ),
        positions(facts),
        Choice("preprocess.mean", mean, reason),
        Choice("preprocess.std", std, reason),
    ]
    if facts.uniform and facts.side <= 1.15 * size:
        choices.append(Choice("preprocess.crop_fraction", 1.0, "all images have this size: nothing is cut off"))
    return choices


def positions(facts: Facts) -> Choice:
    """How the model knows where a patch is."""
    if facts.num_train < 200_000:
        return Choice(
            "model.positions", "sincos2d", "a fixed table tells places from the first step; learning one takes long"
        )
    return Choice("model.positions", "learned", "enough images to learn a table of positions")


def duration(facts: Facts, known: Mapping[str, Any]) -> list[Choice]:
    """Epochs, batch, rate."""
    usual = 64 if facts.num_train < 5_000 else 128 if facts.device == "cpu" else 512
    batch = int(known.get("batch_size", min(usual, facts.num_train)))  # a larger one would hold images twice
    at_least("batch_size", batch, 1)
    # About this many images are seen in all: what a small ViT needs to converge from scratch, less where a CPU would
    # need hours.
    seen = 120_000 if facts.num_train < 5_000 else 900_000 if facts.device == "cpu" else 5_000_000
    epochs = float(min(400, max(10, round(seen / facts.num_train))))
    width = {name: fields["embed_dim"] for name, fields in SIZES.items()}
    size = str(known.get("variant", "ti16")).split("-")[0].rstrip("0123456789")
    lr = 1e-3 * math.sqrt(batch / 128) * math.sqrt(192 / width.get(size, 192))
    steps = float(known.get("epochs", epochs)) * facts.num_train / batch
    return [
        Choice("batch_size", batch, "small sets want more steps" if batch <= 64 else "keeps the device busy"),
        Choice("epochs", epochs, f"{facts.num_train:,} images, about {epochs * facts.num_train:,.0f} seen in all"),
        Choice("optim.lr", float(f"{lr:.1e}"), f"for width {width.get(size, 192)} and batch {batch}"),
        Choice(
            "optim.ema_decay",
            averaging(steps),
            "evaluate the average of about the last 2 % of steps: it generalises better",
        ),
        Choice("optim.label_smoothing", 0.1, "keeps a net that can learn its images by heart from being too sure"),
        Choice("model.drop_path", 0.1, "stochastic depth, against learning by heart"),
        *(
            [Choice("log.eval_every", "1 %", "a hundred evaluations are enough")]
            if float(known.get("epochs", epochs)) > 100
            else []
        ),
    ]


def averaging(steps: float) -> float:
    """Return the decay that averages over about the last 2 % of a run."""
    return round(min(0.9998, max(0.5, 1 - 50 / steps)), 4)


def augmentation(facts: Facts) -> list[Choice]:
    """Random changes that leave the label right."""
    if facts.flip_reason:
        return [
            Choice("augment.flip", 0.0, facts.flip_reason),
            Choice("augment.rotation", 12.0, "hand-made signs lean"),
            Choice("augment.shift", 0.08, "signs are not centred to the pixel"),
            Choice("augment.crop_scale", 0.8, "signs come in different sizes"),
            Choice("augment.fill", "edge", "the background goes on outside"),
        ]
    small = facts.side <= 48
    return [
        Choice("augment.flip", 0.5, "things look alike in a mirror; no class name speaks against it"),
        Choice(
            "augment.crop_scale",
            0.5 if small else 0.25,
            "random resized crops; small images lose detail sooner" if small else "random resized crops",
        ),
        Choice("augment.rotation", 10.0, "small tilts do not change what an image shows"),
        Choice("augment.brightness", 0.2, "light varies"),
        Choice("augment.contrast", 0.2, "light varies"),
        Choice("augment.saturation", 0.2, "colours vary")
        if facts.channels == 3
        else Choice("augment.saturation", 0.0, "grey images"),
    ]


def article(facts: Facts, given: Mapping[str, Any]) -> list[Choice]:
    """The article's own settings: ViT-B/16 at 224, AdamW 3e-5, linear warm-up over 500 of 10,000 steps, dropout 0.1.

    Its other schedule is `--schedule.decay step --schedule.step-every "1 epochs" --schedule.warmup "0 steps"`.
    """
    why = "as in the article"
    seen = 10_000 * int(given.get("batch_size", 128))
    channels = int(given.get("model.in_channels", 3))
    return [
        Choice("model.in_channels", channels, why),
        Choice("variant", "b16", why),
        Choice("batch_size", 128, why),
        Choice("epochs", round(seen / facts.num_train, 4), "10,000 steps, as in the article"),
        Choice("optim.lr", 3e-5, why),
        Choice("schedule.warmup", "500 steps", why),
        Choice("schedule.decay", "linear", why),
        Choice("log.every", "5 steps", why),
        Choice("model.dropout", 0.1, why),
        Choice("model.attention_dropout", 0.1, why),
        Choice("preprocess.mean", (0.485, 0.456, 0.406)[:channels], why),
        Choice("preprocess.std", (0.229, 0.224, 0.225)[:channels], why),
        Choice("preprocess.crop_fraction", 224 / 256, why),
        Choice("augment.crop_scale", 0.25, why),
        Choice("augment.flip", 0.0 if facts.flip_reason else 0.5, facts.flip_reason or why),
        Choice("augment.rotation", 15.0, why),
    ]


RECIPES = {"auto": auto, "article": article}
