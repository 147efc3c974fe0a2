"""The whole of a training run as one value: a tree of frozen dataclasses, JSON in and out.

Recipes (`recipes/`) make one, `--section.field value` changes it, `config.json` in the run folder keeps it.
Imports no torch: `vitrail train --help` is made from it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from vitrail.config_schema import at_least, choice, from_dict, section, seed_range, setting, to_dict
from vitrail.durations import parse_duration
from vitrail.kernels import GLOBAL_NAMES, LOCAL_NAMES
from vitrail.models.config import ENCODER_NAMES, ViTConfig

OPTIMIZER_NAMES = ("adamw",)
DECAY_NAMES = ("cosine", "linear", "step", "constant")
RESIZE_NAMES = ("crop", "squash", "squash_crop", "aspect")
INTERPOLATION_NAMES = ("bilinear", "bicubic", "lanczos", "box", "hamming", "nearest")
CROP_OFFSET_NAMES = ("nearest", "down")
RESAMPLER_NAMES = ("pillow", "torchvision", "fractions")
PRECISION_NAMES = ("fp32", "bf16")
DAMAGED_NAMES = ("stop", "drop", "keep")
DECODE_NAMES = ("exact", "fast")
FILL_NAMES = ("black", "edge", "mirror")
POLICY_NAMES = ("none", "randaugment", "trivialaugment", "three_augment")
ERASING_FILL_NAMES = ("mean", "noise")
LORA_NAMES = ("qkv", "proj", "fc1", "fc2")
DEVICE_NAMES = ("auto", "cpu", "cuda")
SAMPLING_NAMES = ("natural", "balanced", "sqrt")
CLASS_WEIGHT_NAMES = ("none", "inverse", "effective")
UNEVEN = 10  # classes count as uneven where the largest has so many times the images of the smallest


@dataclass(frozen=True)
class DataConfig:
    """Which images, and how they are divided."""

    source: str = setting("", "where the images are: a folder, a table, torchvision:NAME, hf:NAME-or-folder, or digits")
    val_fraction: float = setting(0.2, "share of a dataset without val/ that becomes the validation split")
    test_fraction: float = setting(0.0, "share of a flat folder that is kept apart and evaluated once, at the end")
    split_seed: int = setting(0, "seed of the split; the training seed does not move images between parts")
    folds: int = setting(0, "cross-validation: train this often, each time with another part for validation; 0: off")
    fold: int = setting(-1, "with folds: train only this one, counted from 0, as a run of its own; -1: all")
    sampling: str = setting(
        "natural",
        "natural: every image once an epoch; balanced: every class as often; sqrt: in proportion to the root of its size",
    )
    damaged: str = setting("stop", "broken files: stop and name them, drop them, or keep what can be decoded of them")
    limit_pixels: int = setting(100_000_000, "images with more pixels are refused from their header")
    near_duplicates: bool = setting(True, "look for near duplicates and keep them on one side of the split")
    memory_bytes: int = setting(2_000_000_000, "small images of one size are kept decoded when they fit in this much")
    workers: int = setting(0, "threads that decode files; 0: one per core")
    decode: str = setting(
        "exact",
        "training crops from files: exact, or fast: large JPEGs are decoded smaller and crops are resized by vector code, "
        "which changes pixels a little; evaluation is always exact",
    )
    cache_side: int = setting(
        0, "keep training images on disk, decoded, with this short side in pixels, and crop from that form; 0: off"
    )
    cache_bytes: int = setting(50_000_000_000, "the cache takes at most this much disk; other images are decoded again")

    def __post_init__(self) -> None:
        for field in ("val_fraction", "test_fraction"):
            if not 0 <= getattr(self, field) < 1:
                raise ValueError(
                    f"data.{field} is {getattr(self, field)}; expected a share from 0 up to, not including, 1"
                )
        if self.val_fraction + self.test_fraction >= 1:
            raise ValueError(
                f"data.val_fraction {self.val_fraction} + data.test_fraction {self.test_fraction} leave nothing to train on"
            )
        if self.folds < 0 or self.folds == 1:
            raise ValueError(f"data.folds is {self.folds}; expected 2 or more, or 0 for none")
        if not -1 <= self.fold < max(self.folds, 0):
            expected = f"0 to {self.folds - 1}, or -1 for all" if self.folds else "data.folds with it"
            raise ValueError(f"data.fold is {self.fold}; expected {expected}")
        choice("data.sampling", self.sampling, SAMPLING_NAMES)
        choice("data.damaged", self.damaged, DAMAGED_NAMES)
        choice("data.decode", self.decode, DECODE_NAMES)
        for field in ("cache_side", "cache_bytes"):
            at_least(f"data.{field}", getattr(self, field), 0)
        seed_range("data.split_seed", self.split_seed)
        at_least("data.limit_pixels", self.limit_pixels, 1)
        at_least("data.memory_bytes", self.memory_bytes, 0)
        at_least("data.workers", self.workers, 0)


@dataclass(frozen=True)
class PreprocessConfig:
    """How an image of any size becomes the model's input; the same in training's evaluation, predict and export."""

    resize: str = setting(
        "crop",
        "crop: shortest side, then the centre; squash: both sides, changing the aspect ratio; squash_crop: both sides, then "
        "the centre; aspect: the whole image in its own aspect ratio, with about as many pixels (training still crops "
        "squares)",
    )
    crop_fraction: float = setting(0.9, "with a crop: share of the resized short side that the centre crop keeps")
    crop_offset: str = setting(
        "nearest",
        "where a centre crop begins when half a pixel is left: nearest (as torchvision, timm) or down (as transformers)",
    )
    interpolation: str = setting("bicubic", f"antialiased but for nearest: {', '.join(INTERPOLATION_NAMES)}")
    resampler: str = setting(
        "pillow",
        "who resizes: pillow; torchvision, whose pixels differ by a level here and there; or fractions: Pillow without "
        "rounding to whole levels",
    )
    mean: tuple[float, ...] = setting((0.5, 0.5, 0.5), "subtracted from pixels in 0..1, one per channel")
    std: tuple[float, ...] = setting((0.5, 0.5, 0.5), "divides after the mean, one per channel")

    def __post_init__(self) -> None:
        choice("preprocess.resize", self.resize, RESIZE_NAMES)
        choice("preprocess.crop_offset", self.crop_offset, CROP_OFFSET_NAMES)
        choice("preprocess.interpolation", self.interpolation, INTERPOLATION_NAMES)
        choice("preprocess.resampler", self.resampler, RESAMPLER_NAMES)
        if self.resampler == "torchvision" and self.interpolation in ("box", "hamming", "nearest"):
            raise ValueError(
                f"preprocess.resampler 'torchvision' has no interpolation {self.interpolation!r}; use bilinear, bicubic or "
                "lanczos, or resampler pillow"
            )
        if not 0 < self.crop_fraction <= 1:
            raise ValueError(f"preprocess.crop_fraction is {self.crop_fraction}; expected above 0, at most 1")
        if len(self.mean) != len(self.std) or any(value <= 0 for value in self.std):
            raise ValueError(
                f"preprocess.mean {self.mean} and std {self.std}: expected as many of each, every std above 0"
            )


@dataclass(frozen=True)
class AugmentConfig:
    """Random changes to training images, each drawn anew whenever an image comes."""

    crop_scale: float = setting(1.0, "smallest share of the area that a random resized crop keeps; 1: no cropping")
    crop_ratio: float = setting(4 / 3, "largest aspect ratio of a crop, and its inverse the smallest")
    flip: float = setting(0.0, "chance of a left-right flip")
    vertical_flip: float = setting(0.0, "chance of a top-bottom flip")
    rotation: float = setting(0.0, "largest rotation to either side, degrees")
    shift: float = setting(0.0, "largest shift to either side, as a share of the image's side")
    brightness: float = setting(0.0, "largest relative change of brightness")
    contrast: float = setting(0.0, "largest relative change of contrast")
    saturation: float = setting(0.0, "largest relative change of saturation")
    fill: str = setting("mirror", "what rotation and shift bring in from outside the image: black, edge or mirror")
    repeats: int = setting(
        1, "repeated augmentation: how often each image comes in its batch, each time changed differently"
    )
    policy: str = setting("none", f"published changes, after all those above: {', '.join(POLICY_NAMES)}")
    policy_ops: int = setting(2, "randaugment: operations an image, 1 to 4")
    policy_magnitude: int = setting(9, "randaugment: their strength, 0 to 30")
    erasing: float = setting(0.0, "chance that a box of 2 to 33 % of the area is erased")
    erasing_fill: str = setting("mean", "what fills it: mean, the data's own (0 for the model), or noise")
    mixup: float = setting(0.0, "blend two images and their labels, the share from Beta(this, this); 0: off")
    cutmix: float = setting(
        0.0, "put a box of one image and its label's share into another, its area from Beta(this, this); 0: off"
    )
    mix_chance: float = setting(1.0, "share of pairs that mixup or cutmix mixes; with both on, each takes half of them")

    def __post_init__(self) -> None:
        if not 0 < self.crop_scale <= 1:
            raise ValueError(f"augment.crop_scale is {self.crop_scale}; expected above 0, at most 1 (1: no cropping)")
        if self.crop_ratio < 1:
            raise ValueError(f"augment.crop_ratio is {self.crop_ratio}; expected 1 or more")
        shares = ("flip", "vertical_flip", "shift", "brightness", "contrast", "saturation", "erasing", "mix_chance")
        for field in shares:
            if not 0 <= getattr(self, field) <= 1:
                raise ValueError(f"augment.{field} is {getattr(self, field)}; expected 0 to 1")
        if not 0 <= self.rotation <= 180:
            raise ValueError(f"augment.rotation is {self.rotation}; expected 0 to 180 degrees")
        choice("augment.fill", self.fill, FILL_NAMES)
        at_least("augment.repeats", self.repeats, 1)
        choice("augment.policy", self.policy, POLICY_NAMES)
        choice("augment.erasing_fill", self.erasing_fill, ERASING_FILL_NAMES)
        for field, least, most in (("policy_ops", 1, 4), ("policy_magnitude", 0, 30)):
            if not least <= getattr(self, field) <= most:
                raise ValueError(f"augment.{field} is {getattr(self, field)}; expected {least} to {most}")
        at_least("augment.mixup", self.mixup, 0)
        at_least("augment.cutmix", self.cutmix, 0)

    @property
    def mixes(self) -> bool:
        """Whether images are mixed two by two."""
        return self.mixup > 0 or self.cutmix > 0


@dataclass(frozen=True)
class OptimConfig:
    """How weights move."""

    name: str = setting("adamw", f"optimizer: {', '.join(OPTIMIZER_NAMES)}")
    lr: float = setting(1e-3, "peak learning rate, at the global batch size of the run")
    weight_decay: float = setting(0.05, "decoupled weight decay; biases, norms, tokens and positions are exempt")
    beta1: float = setting(0.9, "AdamW's decay of the mean gradient")
    beta2: float = setting(0.999, "AdamW's decay of the mean squared gradient")
    eps: float = setting(1e-8, "AdamW's epsilon")
    clip_norm: float = setting(1.0, "largest norm of the whole gradient; 0: no clipping")
    accumulate: int = setting(1, "parts that a batch is computed in, one after the other, to save memory")
    ema_decay: float = setting(0.0, "average the weights with this decay per step and evaluate the average; 0: off")
    label_smoothing: float = setting(0.0, "share of the target spread over all labels")
    class_weights: str = setting(
        "none",
        "what an image counts in the loss: none: all alike; inverse: 1 / size of its class; effective: by the effective "
        "number of its class's images",
    )
    effective_beta: float = setting(0.999, "with effective weights: how soon further images of a class add less")
    freeze: tuple[str, ...] = setting(
        (), "parts of the model that stay as they are, by name, such as patch_embed.backbone"
    )
    layer_decay: float = setting(
        1.0, "the rate of a block as a share of the next one's (Bao et al. 2022, BEiT); 1: all learn alike"
    )
    head_warmup: str = setting(
        "0 steps", "with trained weights: for this long only the head, and what starts at random, learns"
    )

    def __post_init__(self) -> None:
        choice("optim.name", self.name, OPTIMIZER_NAMES)
        for field in ("lr", "eps"):
            if getattr(self, field) <= 0:
                raise ValueError(f"optim.{field} is {getattr(self, field)}; expected above 0")
        choice("optim.class_weights", self.class_weights, CLASS_WEIGHT_NAMES)
        for field in ("beta1", "beta2", "ema_decay", "label_smoothing", "effective_beta"):
            if not 0 <= getattr(self, field) < 1:
                raise ValueError(f"optim.{field} is {getattr(self, field)}; expected from 0 up to, not including, 1")
        at_least("optim.weight_decay", self.weight_decay, 0)
        at_least("optim.clip_norm", self.clip_norm, 0)
        at_least("optim.accumulate", self.accumulate, 1)
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"optim.layer_decay is {self.layer_decay}; expected above 0, at most 1 (1: off)")
        parse_duration(self.head_warmup, "optim.head_warmup")


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (Hu et al. 2021): these, the head and what starts at random learn; all else stays."""

    rank: int = setting(0, "rank of the adapters, such as 8; 0: off")
    alpha: float = setting(16.0, "an adapter's output is multiplied by alpha / rank")
    targets: tuple[str, ...] = setting(("qkv", "proj"), f"layers of every block that have one: {', '.join(LORA_NAMES)}")

    def __post_init__(self) -> None:
        at_least("lora.rank", self.rank, 0)
        if self.alpha <= 0:
            raise ValueError(f"lora.alpha is {self.alpha}; expected above 0")
        for target in self.targets:
            choice("lora.targets", target, LORA_NAMES)
        if not self.targets or len(set(self.targets)) != len(self.targets):
            raise ValueError(f"lora.targets {' '.join(self.targets)!r}: expected one or more, each once")


@dataclass(frozen=True)
class ScheduleConfig:
    """How the learning rate changes over a run. Durations read `500 steps`, `2 epochs` or `5 %`."""

    decay: str = setting("cosine", f"after the warm-up: {', '.join(DECAY_NAMES)}")
    warmup: str = setting("5 %", "linear rise from zero to the peak")
    final_fraction: float = setting(0.01, "cosine and linear end at this share of the peak")
    step_every: str = setting("30 %", "step decay: how often the rate is multiplied by step_gamma")
    step_gamma: float = setting(0.1, "step decay: the factor")

    def __post_init__(self) -> None:
        choice("schedule.decay", self.decay, DECAY_NAMES)
        for field in ("warmup", "step_every"):
            parse_duration(getattr(self, field), f"schedule.{field}")
        if parse_duration(self.step_every, "schedule.step_every")[0] <= 0:
            raise ValueError(f"schedule.step_every is {self.step_every!r}; expected a duration above 0")
        if not 0 <= self.final_fraction <= 1 or not 0 < self.step_gamma <= 1:
            raise ValueError(
                f"schedule.final_fraction is {self.final_fraction}, schedule.step_gamma {self.step_gamma}; "
                "expected 0 to 1, and above 0 for step_gamma"
            )


@dataclass(frozen=True)
class LogConfig:
    """When a run reports, evaluates and saves."""

    every: str = setting("20 steps", "a line of training metrics")
    eval_every: str = setting("1 epochs", "evaluate on the validation split")
    save_minutes: float = setting(5.0, "besides the end of every epoch, save the exact state this often")

    def __post_init__(self) -> None:
        for field in ("every", "eval_every"):
            if parse_duration(getattr(self, field), f"log.{field}")[0] <= 0:
                raise ValueError(f"log.{field} is {getattr(self, field)!r}; expected a duration above 0")
        at_least("log.save_minutes", self.save_minutes, 0)


@dataclass(frozen=True)
class KernelConfig:
    """How attention is computed. The result is the same up to rounding; `vitrail doctor` shows what was measured."""

    global_attention: str = setting("auto", f"auto: measured once on this machine; or {', '.join(GLOBAL_NAMES)}")
    local_attention: str = setting("auto", f"auto: measured once on this machine; or {', '.join(LOCAL_NAMES)}")

    def __post_init__(self) -> None:
        choice("kernels.global_attention", self.global_attention, ("auto", *GLOBAL_NAMES))
        choice("kernels.local_attention", self.local_attention, ("auto", *LOCAL_NAMES))


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run's result, resolved: nothing is left to be chosen later."""

    recipe: str = setting("auto", "name of the recipe, or a config.json of an earlier run")
    variant: str = setting("b16", "name of the architecture that `model` was made from; empty with pretrained")
    pretrained: str = setting("", "weights to start from: a run, a model or weights file, hf:…, timm:…; empty: random")
    encoder_weights: str = setting("", "trained weights of a CNN encoder: timm, or a file; empty: start at random")
    epochs: float = setting(10.0, "passes over the training split")
    batch_size: int = setting(128, "images per step, over all processes")
    seed: int = setting(0, "decides initial weights, order, augmentation and dropout")
    device: str = setting("auto", f"where to compute: {', '.join(DEVICE_NAMES)}")
    precision: str = setting("fp32", "fp32, or bf16 mixed precision")
    compile: bool = setting(False, "compile the model with torch.compile")
    data: DataConfig = section(DataConfig, "the images and their division")
    model: ViTConfig = section(ViTConfig, "the architecture")
    preprocess: PreprocessConfig = section(PreprocessConfig, "from an image to the model's input")
    augment: AugmentConfig = section(AugmentConfig, "random changes to training images")
    optim: OptimConfig = section(OptimConfig, "how weights move")
    lora: LoraConfig = section(LoraConfig, "low-rank adapters")
    schedule: ScheduleConfig = section(ScheduleConfig, "the learning rate over time")
    log: LogConfig = section(LogConfig, "reports, evaluations and saves")
    kernels: KernelConfig = section(KernelConfig, "how attention is computed")

    def __post_init__(self) -> None:
        if self.epochs <= 0:
            raise ValueError(f"epochs is {self.epochs}; expected above 0")
        at_least("batch_size", self.batch_size, 1)
        seed_range("seed", self.seed)
        choice("precision", self.precision, PRECISION_NAMES)
        choice("device", self.device, DEVICE_NAMES)
        if self.batch_size % self.optim.accumulate:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of optim.accumulate {self.optim.accumulate}"
            )
        if self.batch_size % self.augment.repeats:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of augment.repeats {self.augment.repeats}, how often each "
                "image comes in a batch; change one of them"
            )
        if self.data.sampling != "natural" and self.optim.class_weights != "none":
            raise ValueError(
                f"data.sampling {self.data.sampling!r} shows rare classes more often, and optim.class_weights "
                f"{self.optim.class_weights!r} lets each of their images count more: uneven classes would be corrected "
                "twice; leave one of them out"
            )
        if self.preprocess.resize == "aspect" and self.augment.crop_scale == 1:
            raise ValueError(
                "preprocess.resize 'aspect' evaluates images in their own aspect ratio, but training needs squares: set "
                "augment.crop_scale below 1 for random crops"
            )
        self._check_pretrained()
        if self.encoder_weights and self.model.encoder in ENCODER_NAMES:
            raise ValueError(
                f"encoder_weights {self.encoder_weights!r} is for a CNN of timm as encoder, but model.encoder is "
                f"{self.model.encoder!r}; leave it out, or try --model.encoder resnet50"
            )
        if len(self.preprocess.mean) != self.model.in_channels:
            raise ValueError(
                f"preprocess.mean has {len(self.preprocess.mean)} values, but model.in_channels is {self.model.in_channels}; "
                "give one mean and one std per channel"
            )

    def _check_pretrained(self) -> None:
        if self.pretrained and self.encoder_weights:
            raise ValueError(
                f"encoder_weights {self.encoder_weights!r} would replace a part of the weights of {self.pretrained}, which "
                "have their own encoder; leave one of them out"
            )
        if self.lora.rank and not self.pretrained:
            raise ValueError(
                f"lora.rank {self.lora.rank} adapts trained weights, but these start at random; give --model a run, a "
                "weights file, hf:… or timm:…, or leave it out"
            )
        if self.lora.rank > self.model.embed_dim:
            raise ValueError(f"lora.rank is {self.lora.rank}; expected at most model.embed_dim {self.model.embed_dim}")
        if self.warms_head and not (self.pretrained or self.encoder_weights):
            raise ValueError(
                f"optim.head_warmup {self.optim.head_warmup!r} holds trained weights, but all of these start at random; give "
                "--model a run, a weights file, hf:… or timm:…, or leave it out"
            )

    @property
    def warms_head(self) -> bool:
        """Whether the head learns alone at first."""
        return parse_duration(self.optim.head_warmup, "optim.head_warmup")[0] > 0


def save_config(config: RunConfig, path: Path) -> None:
    """Write a configuration as JSON that `load_config` reads back equal."""
    from vitrail.files import write_text

    write_text(path, json.dumps(to_dict(config), indent=2) + "\n")


def load_config(path: Path) -> RunConfig:
    """Read a configuration that `save_config` wrote.

    Raises:
        ValueError: the file is no JSON, or has an unknown setting or a refused value.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a JSON configuration ({error})") from None
    try:
        return from_dict(RunConfig, values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
