"""The whole configuration of a training run: a tree of frozen dataclasses, written to JSON and read back.

Recipes (`recipes/`) build it, `--section.field value` changes it, and `config.json` in the run folder holds it.
Imports no torch: `vitrail train --help` is made from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vitrail.config_schema import (
    at_least,
    below_one,
    between,
    choice,
    one_at_most,
    positive,
    read_config_json,
    section,
    seed_range,
    setting,
    write_config_json,
)
from vitrail.durations import parse_duration
from vitrail.kernels import GLOBAL_NAMES, LOCAL_NAMES
from vitrail.models.config import ENCODER_NAMES, ViTConfig

RECIPE_NAMES = ("auto", "fine_tune", "article", "digits", "cifar10", "s16_in1k", "deit3_s16")
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
UNEVEN = 10  # classes count as uneven when the largest has this many times the images of the smallest


@dataclass(frozen=True)
class DataConfig:
    """Which images a run reads, and how they are split."""

    source: str = setting("", "the dataset: a folder, a table, tar shards, torchvision:NAME, hf:NAME or digits")
    val_fraction: float = setting(0.2, "share that becomes the validation split, where the dataset has none")
    test_fraction: float = setting(0.0, "share that becomes the test split, where the dataset has no splits")
    split_seed: int = setting(0, "seed of the split; the training seed moves no image from one split to another")
    folds: int = setting(0, "cross-validation: this many trainings, each with another fold as validation split; 0: off")
    fold: int = setting(-1, "with folds: train this one only, counted from 0, as a run of its own; -1: all")
    sampling: str = setting(
        "natural",
        "natural: each image once an epoch; balanced: each class as often; sqrt: by the square root of a class's size",
    )
    damaged: str = setting("stop", "broken files: stop and name them, drop them, or keep what can be decoded")
    limit_pixels: int = setting(100_000_000, "images with more pixels are refused before they are decoded")
    near_duplicates: bool = setting(True, "find near duplicates and keep them in one split")
    memory_bytes: int = setting(2_000_000_000, "small images of one size stay decoded in memory up to this size")
    workers: int = setting(0, "threads that decode files; 0: one per core")
    decode: str = setting(
        "exact",
        "training crops from files: exact, or fast: large JPEGs are decoded smaller, and crops resized by vector code, "
        "which changes pixels a little; evaluation is always exact",
    )
    cache_side: int = setting(0, "cache training images on disk, decoded, with this short side in pixels; 0: off")
    cache_bytes: int = setting(50_000_000_000, "largest size of that cache; other images are decoded each time")

    def __post_init__(self) -> None:
        for field in ("val_fraction", "test_fraction"):
            below_one(f"data.{field}", getattr(self, field))
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
        for field in ("cache_side", "cache_bytes", "memory_bytes", "workers"):
            at_least(f"data.{field}", getattr(self, field), 0)
        seed_range("data.split_seed", self.split_seed)
        at_least("data.limit_pixels", self.limit_pixels, 1)


@dataclass(frozen=True)
class PreprocessConfig:
    """How an image of any size becomes the model's input: the same in evaluation, `eval`, `predict` and `export`."""

    resize: str = setting(
        "crop",
        "crop: resize the short side, then cut out the centre; squash: resize both sides, which changes the aspect ratio; "
        "squash_crop: resize both sides, then cut out the centre; aspect: the whole image in its own aspect ratio, with "
        "about as many pixels (training still crops squares)",
    )
    crop_fraction: float = setting(0.9, "share of the resized short side that the centre crop keeps")
    crop_offset: str = setting(
        "nearest", "rounding of a crop's position: nearest (torchvision, timm), down (transformers)"
    )
    interpolation: str = setting("bicubic", f"antialiased except nearest: {', '.join(INTERPOLATION_NAMES)}")
    resampler: str = setting(
        "pillow",
        "library that resizes: pillow; torchvision, whose pixels differ by one level here and there; or fractions: Pillow "
        "without rounding to whole levels",
    )
    mean: tuple[float, ...] = setting((0.5, 0.5, 0.5), "subtracted from pixels between 0 and 1, one per channel")
    std: tuple[float, ...] = setting((0.5, 0.5, 0.5), "divides pixels after the mean is subtracted, one per channel")

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
        one_at_most("preprocess.crop_fraction", self.crop_fraction)
        if len(self.mean) != len(self.std) or any(value <= 0 for value in self.std):
            raise ValueError(
                f"preprocess.mean {self.mean} and std {self.std}: expected as many of each, every std above 0"
            )


@dataclass(frozen=True)
class AugmentConfig:
    """Random changes to training images, drawn anew each time an image is read."""

    crop_scale: float = setting(1.0, "smallest share of the area that a random resized crop keeps; 1: no cropping")
    crop_ratio: float = setting(4 / 3, "largest aspect ratio of a crop; the smallest is its inverse")
    flip: float = setting(0.0, "probability of a left-right flip")
    vertical_flip: float = setting(0.0, "probability of a top-bottom flip")
    rotation: float = setting(0.0, "largest rotation in either direction, degrees")
    shift: float = setting(0.0, "largest shift in any direction, as a share of the image's side")
    brightness: float = setting(0.0, "largest relative change of brightness")
    contrast: float = setting(0.0, "largest relative change of contrast")
    saturation: float = setting(0.0, "largest relative change of saturation")
    fill: str = setting("mirror", "what fills the border after a rotation or shift: black, edge or mirror")
    repeats: int = setting(1, "repeated augmentation: copies of each image in its batch, each changed differently")
    policy: str = setting("none", f"a published policy, applied after the changes above: {', '.join(POLICY_NAMES)}")
    policy_ops: int = setting(2, "randaugment: operations per image, 1 to 4")
    policy_magnitude: int = setting(9, "randaugment: strength of the operations, 0 to 30")
    erasing: float = setting(0.0, "random erasing: probability that a box of 2 to 33 % of the area is erased")
    erasing_fill: str = setting("mean", "what fills the box: the dataset's mean (0 for the model), or noise")
    mixup: float = setting(0.0, "blend pairs of images and their labels by shares from Beta(this, this); 0: off")
    cutmix: float = setting(0.0, "put a box of one image into the other, its area from Beta(this, this); 0: off")
    mix_chance: float = setting(1.0, "share of pairs that are mixed; mixup and cutmix, both on, get half of them each")

    def __post_init__(self) -> None:
        one_at_most("augment.crop_scale", self.crop_scale, "(1: no cropping)")
        if self.crop_ratio < 1:
            raise ValueError(f"augment.crop_ratio is {self.crop_ratio}; expected 1 or more")
        shares = ("flip", "vertical_flip", "shift", "brightness", "contrast", "saturation", "erasing", "mix_chance")
        for field in shares:
            between(f"augment.{field}", getattr(self, field), 0, 1)
        between("augment.rotation", self.rotation, 0, 180, "degrees")
        choice("augment.fill", self.fill, FILL_NAMES)
        at_least("augment.repeats", self.repeats, 1)
        choice("augment.policy", self.policy, POLICY_NAMES)
        choice("augment.erasing_fill", self.erasing_fill, ERASING_FILL_NAMES)
        between("augment.policy_ops", self.policy_ops, 1, 4)
        between("augment.policy_magnitude", self.policy_magnitude, 0, 30)
        at_least("augment.mixup", self.mixup, 0)
        at_least("augment.cutmix", self.cutmix, 0)

    @property
    def mixes(self) -> bool:
        """Whether images are mixed in pairs, by mixup or cutmix."""
        return self.mixup > 0 or self.cutmix > 0


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer, the loss, and which weights are trained."""

    name: str = setting("adamw", f"optimizer: {', '.join(OPTIMIZER_NAMES)}")
    lr: float = setting(1e-3, "peak learning rate, at the global batch size of the run")
    weight_decay: float = setting(0.05, "decoupled weight decay; biases, norms, tokens and positions are exempt")
    beta1: float = setting(0.9, "AdamW's decay of the running mean of the gradient")
    beta2: float = setting(0.999, "AdamW's decay of the running mean of the squared gradient")
    eps: float = setting(1e-8, "AdamW's epsilon")
    clip_norm: float = setting(1.0, "largest norm of the whole gradient, which is scaled down to it; 0: no clipping")
    accumulate: int = setting(1, "gradient accumulation: pieces that a batch is computed in, to save memory")
    ema_decay: float = setting(0.0, "decay per step of an average of the weights, which is then evaluated; 0: off")
    label_smoothing: float = setting(0.0, "share of the target that is spread over all labels")
    class_weights: str = setting(
        "none",
        "weight of an image in the loss: none: all alike; inverse: 1 / size of its class; effective: 1 / effective number "
        "of images of its class",
    )
    effective_beta: float = setting(0.999, "effective number of a class of n images: (1 - beta^n) / (1 - beta)")
    freeze: tuple[str, ...] = setting((), "modules that are not trained, by name, such as patch_embed.backbone")
    layer_decay: float = setting(1.0, "a block's learning rate as a share of the next block's (as in BEiT); 1: equal")
    head_warmup: str = setting("0 steps", "from trained weights: how long only the head and new weights are trained")

    def __post_init__(self) -> None:
        choice("optim.name", self.name, OPTIMIZER_NAMES)
        for field in ("lr", "eps"):
            positive(f"optim.{field}", getattr(self, field))
        choice("optim.class_weights", self.class_weights, CLASS_WEIGHT_NAMES)
        for field in ("beta1", "beta2", "ema_decay", "label_smoothing", "effective_beta"):
            below_one(f"optim.{field}", getattr(self, field))
        at_least("optim.weight_decay", self.weight_decay, 0)
        at_least("optim.clip_norm", self.clip_norm, 0)
        at_least("optim.accumulate", self.accumulate, 1)
        one_at_most("optim.layer_decay", self.layer_decay, "(1: off)")
        parse_duration(self.head_warmup, "optim.head_warmup")


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (Hu et al. 2021): only they, the head and new weights are trained."""

    rank: int = setting(0, "rank of the adapters, such as 8; 0: off")
    alpha: float = setting(16.0, "an adapter's output is multiplied by alpha / rank")
    targets: tuple[str, ...] = setting(("qkv", "proj"), f"layers of each block to adapt: {', '.join(LORA_NAMES)}")

    def __post_init__(self) -> None:
        at_least("lora.rank", self.rank, 0)
        positive("lora.alpha", self.alpha)
        for target in self.targets:
            choice("lora.targets", target, LORA_NAMES)
        if not self.targets or len(set(self.targets)) != len(self.targets):
            raise ValueError(f"lora.targets {' '.join(self.targets)!r}: expected one or more layers, each once")


@dataclass(frozen=True)
class ScheduleConfig:
    """How the learning rate changes over a run. Durations are written `500 steps`, `2 epochs` or `5 %`."""

    decay: str = setting("cosine", f"the learning rate after the warm-up: {', '.join(DECAY_NAMES)}")
    warmup: str = setting("5 %", "duration of the linear rise from zero to the peak learning rate")
    final_fraction: float = setting(0.01, "cosine and linear decay end at this share of the peak learning rate")
    step_every: str = setting("30 %", "step decay: how often the learning rate is multiplied by step_gamma")
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

    every: str = setting("20 steps", "how often training metrics are written")
    eval_every: str = setting("1 epochs", "how often the model is evaluated on the validation split")
    save_minutes: float = setting(5.0, "save the exact state this often, besides the end of every epoch")

    def __post_init__(self) -> None:
        for field in ("every", "eval_every"):
            if parse_duration(getattr(self, field), f"log.{field}")[0] <= 0:
                raise ValueError(f"log.{field} is {getattr(self, field)!r}; expected a duration above 0")
        at_least("log.save_minutes", self.save_minutes, 0)


@dataclass(frozen=True)
class KernelConfig:
    """Which kernel computes attention. Results are equal up to rounding; `vitrail doctor` shows what was measured."""

    global_attention: str = setting("auto", f"auto: the fastest measured on this machine; or {', '.join(GLOBAL_NAMES)}")
    local_attention: str = setting("auto", f"auto: the fastest measured on this machine; or {', '.join(LOCAL_NAMES)}")

    def __post_init__(self) -> None:
        choice("kernels.global_attention", self.global_attention, ("auto", *GLOBAL_NAMES))
        choice("kernels.local_attention", self.local_attention, ("auto", *LOCAL_NAMES))


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run's result, resolved: nothing is left to choose later."""

    recipe: str = setting("auto", "name of the recipe, or a config.json of an earlier run")
    variant: str = setting("b16", "name of the architecture that `model` was built from; empty with pretrained")
    pretrained: str = setting("", "weights to start from: a run, a weights file, hf:…, timm:…; empty: random weights")
    encoder_weights: str = setting("", "trained weights of a CNN encoder: timm, or a file; empty: random weights")
    epochs: float = setting(10.0, "passes over the training split")
    batch_size: int = setting(128, "images per step, over all processes")
    seed: int = setting(0, "decides initial weights, the order of images, augmentation and dropout")
    device: str = setting("auto", f"where to compute: {', '.join(DEVICE_NAMES)}")
    precision: str = setting("fp32", "fp32, or bf16 mixed precision")
    compile: bool = setting(False, "compile the model with torch.compile")
    data: DataConfig = section(DataConfig, "the images and their splits")
    model: ViTConfig = section(ViTConfig, "the architecture")
    preprocess: PreprocessConfig = section(PreprocessConfig, "how an image becomes the model's input")
    augment: AugmentConfig = section(AugmentConfig, "random changes to training images")
    optim: OptimConfig = section(OptimConfig, "optimizer, loss, and which weights are trained")
    lora: LoraConfig = section(LoraConfig, "low-rank adapters")
    schedule: ScheduleConfig = section(ScheduleConfig, "the learning rate over time")
    log: LogConfig = section(LogConfig, "when a run reports, evaluates and saves")
    kernels: KernelConfig = section(KernelConfig, "which kernel computes attention")

    def __post_init__(self) -> None:
        positive("epochs", self.epochs)
        at_least("batch_size", self.batch_size, 1)
        seed_range("seed", self.seed)
        choice("precision", self.precision, PRECISION_NAMES)
        choice("device", self.device, DEVICE_NAMES)
        self._check_batches()
        self._check_preprocessing()
        self._check_start()

    def _check_batches(self) -> None:
        """Raise a ValueError unless batches can be divided as asked, and classes are weighted in one way."""
        if self.batch_size % self.optim.accumulate:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of optim.accumulate {self.optim.accumulate}"
            )
        if self.batch_size % self.augment.repeats:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of augment.repeats {self.augment.repeats}, the number of "
                "times that each image is in its batch; change one of them"
            )
        if self.data.sampling != "natural" and self.optim.class_weights != "none":
            raise ValueError(
                f"data.sampling {self.data.sampling!r} shows rare classes more often, and optim.class_weights "
                f"{self.optim.class_weights!r} gives each of their images more weight: uneven classes would be corrected "
                "twice; leave one of them out"
            )

    def _check_preprocessing(self) -> None:
        """Raise a ValueError unless preprocessing, augmentation and model fit together."""
        if self.preprocess.resize == "aspect" and self.augment.crop_scale == 1:
            raise ValueError(
                "preprocess.resize 'aspect' evaluates images in their own aspect ratio, but training needs squares: set "
                "augment.crop_scale below 1 for random crops"
            )
        if len(self.preprocess.mean) != self.model.in_channels:
            raise ValueError(
                f"preprocess.mean has {len(self.preprocess.mean)} values, but model.in_channels is {self.model.in_channels}; "
                "give one mean and one std per channel"
            )

    def _check_start(self) -> None:
        """Raise a ValueError unless the weights to start from, and the settings that need trained ones, fit together."""
        if self.encoder_weights and self.pretrained:
            raise ValueError(
                f"encoder_weights {self.encoder_weights!r} would replace some of the weights of {self.pretrained}, which "
                "have their own encoder; leave one of them out"
            )
        if self.encoder_weights and self.model.encoder in ENCODER_NAMES:
            raise ValueError(
                f"encoder_weights {self.encoder_weights!r} is for a CNN of timm as encoder, but model.encoder is "
                f"{self.model.encoder!r}; leave it out, or try --model.encoder resnet50"
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
        """Whether only the head, and what else is new, is trained at first."""
        return parse_duration(self.optim.head_warmup, "optim.head_warmup")[0] > 0


def save_config(config: RunConfig, path: Path) -> None:
    """Write a configuration as JSON that `load_config` reads back equal."""
    write_config_json(config, path)


def load_config(path: Path) -> RunConfig:
    """Read a configuration that `save_config` wrote.

    Raises:
        ValueError: the file is no JSON, or has an unknown setting or a refused value.
    """
    return read_config_json(RunConfig, path)
