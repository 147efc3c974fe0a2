"""Hashes of the weights and losses of six short trainings: a change of structure must leave all of them as they are.

    PYTHONPATH=TREE python benchmarks/weights_hash.py [--json FILE] [--against FILE] [--only NAME…]

Makes images itself, and trains through the public command line only, so that one copy of this script compares any two
versions of Vitrail on one machine. Between machines, or versions of PyTorch and Pillow, hashes differ. Everything that
a recipe would choose is given explicitly: fp32 on the CPU, one thread, a fixed attention kernel, fixed seeds. The runs:

- `digits`: images in memory, global attention, a class token.
- `folder`: JPEG and PNG files, random resized crops, flips, rotations, colours, EMA.
- `table`: the same files with a split and a group column, local attention, registers, the decoder `concat`, a policy.
- `shards`: the same images in tar files, decoded smaller, several patch sizes, mixup and cutmix.
- `finetuned`: starts from `folder`'s run, with layer decay, a head warm-up and class weights.
- `two-processes`: the folder again, over two processes (gloo), with accumulation and repeated augmentation.

The first hash is over the names, types, shapes and bytes of the tensors in `model.safetensors`, without its metadata. The
second is over the step, `train/loss` and `eval/*` of every line of `metrics.jsonl`.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

CLASSES = ("flat", "slant", "steep")
IMAGES_PER_CLASS = 21

COMMON = """
    --seed 3 --device cpu --precision fp32 --compile False --kernels.global-attention fused
    --optim.lr 2e-3 --optim.weight-decay 0.05 --optim.clip-norm 1 --schedule.decay cosine --schedule.warmup 10%
    --log.save-minutes 5
"""
ON_IMAGES = """
    --model nano4 --model.image-size 32 --model.patch-size 8 --model.depth 2 --model.in-channels 3
    --preprocess.mean 0.5 0.5 0.5 --preprocess.std 0.25 0.25 0.25 --preprocess.resize crop --preprocess.crop-fraction 0.9
    --preprocess.interpolation bicubic --batch-size 8 --log.every 2steps --log.eval-every 1epochs
    --augment.flip 0.5 --augment.crop-scale 0.4 --augment.rotation 15 --augment.brightness 0.2 --augment.contrast 0.2
    --augment.saturation 0.2 --model.drop-path 0.1 --optim.label-smoothing 0.1
"""

SETTINGS = {
    "digits": """
        --model nano2 --model.image-size 8 --model.patch-size 2 --model.depth 2 --model.in-channels 1
        --model.decoder token --model.class-token True --model.positions learned --model.dropout 0.1
        --model.drop-path 0.1 --preprocess.mean 0.5 --preprocess.std 0.5 --preprocess.crop-fraction 1
        --data.val-fraction 0.2 --optim.ema-decay 0.5 --optim.label-smoothing 0.1
        --data.sampling natural --augment.flip 0 --augment.crop-scale 0.8 --augment.rotation 12 --augment.shift 0.08
        --augment.fill edge --batch-size 64 --epochs 1.5 --log.every 5steps --log.eval-every 10steps
    """,
    "folder": f"""{ON_IMAGES}
        --model.decoder mean --model.class-token False --model.positions sincos2d
        --data.val-fraction 0.25 --data.test-fraction 0.1 --data.decode exact --augment.fill mirror
        --optim.ema-decay 0.9 --epochs 4
    """,
    "table": f"""{ON_IMAGES}
        --model.attention local,global --model.window 3 --kernels.local-attention tiles --model.num-registers 2
        --model.decoder concat --model.class-token True --model.positions rope2d --model.layer-scale 0.1
        --data.val-fraction 0.25 --data.sampling balanced --data.cache-side 48 --data.decode exact
        --augment.policy randaugment --augment.erasing 0.3 --augment.vertical-flip 0.5 --optim.ema-decay 0 --epochs 4
    """,
    "shards": f"""{ON_IMAGES}
        --model.patch-sizes 4 8 16 --model.decoder attention --model.class-token False --model.positions sincos2d
        --data.val-fraction 0.25 --data.decode fast --augment.mixup 0.4 --augment.cutmix 1 --augment.mix-chance 0.8
        --optim.ema-decay 0.9 --epochs 4
    """,
    "finetuned": """
        --batch-size 8 --epochs 4 --log.every 2steps --log.eval-every 1epochs --data.val-fraction 0.25
        --data.decode exact --augment.flip 0.5 --augment.crop-scale 0.6 --augment.rotation 5 --optim.layer-decay 0.7
        --optim.head-warmup 3steps --optim.class-weights inverse --optim.ema-decay 0.8 --optim.label-smoothing 0.1
        --model.drop-path 0.1
    """,
    "two-processes": f"""{ON_IMAGES}
        --model.encoder conv --model.decoder mean --model.class-token False --model.positions learned
        --data.val-fraction 0.25 --data.decode exact --optim.accumulate 2 --augment.repeats 2 --optim.ema-decay 0.9
        --epochs 4
    """,
}


def main() -> None:
    """Make the datasets, train, print the hashes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the hashes here")
    parser.add_argument("--against", type=Path, help="hashes of an earlier --json; exit code 1 unless these are equal")
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="train these only")
    parser.add_argument("--keep", type=Path, help="work in this folder, which must be new, and leave it there")
    args = parser.parse_args()
    if args.keep:
        args.keep.mkdir(parents=True)
        hashes = run_all(args.keep.resolve(), args.only)
    else:
        with tempfile.TemporaryDirectory() as folder:
            hashes = run_all(Path(folder).resolve(), args.only)
    if args.json:
        args.json.write_text(json.dumps(hashes, indent=2) + "\n", encoding="utf-8")
    if args.against:
        sys.exit(compare(hashes, json.loads(args.against.read_text(encoding="utf-8"))))


def run_all(folder: Path, names: list[str]) -> dict[str, dict[str, str]]:
    """Return the hashes of the named trainings, made in an empty folder; prints each as it comes."""
    print(f"of {tree()}\n{'run':<15}{'weights':<18}metrics", flush=True)
    sources = make_sources(folder)
    hashes = {}
    needed = {*names, *(["folder"] if "finetuned" in names else [])}
    for name in (name for name in SETTINGS if name in needed):
        started = time.perf_counter()
        run = folder / "runs" / name
        arguments = ["train", sources[name], "--out", str(run), *COMMON.split(), *SETTINGS[name].split()]
        if name == "finetuned":
            arguments += ["--model", str(folder / "runs" / "folder")]
        vitrail(arguments, folder, num_processes=2 if name == "two-processes" else 1)
        hashes[name] = {"weights": hash_weights(run / "model.safetensors"), "metrics": hash_metrics(run)}
        seconds = time.perf_counter() - started
        print(f"{name:<15}{hashes[name]['weights']:<18}{hashes[name]['metrics']}   {seconds:.0f} s", flush=True)
    return hashes


def make_sources(folder: Path) -> dict[str, str]:
    """Write a folder of images, a table and shards of them; returns the DATA argument of every training."""
    photos = folder / "photos"
    rows = list(write_images(photos))
    table = folder / "photos.csv"
    with open(table, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    vitrail(["shard", str(photos), str(folder / "shards"), "--size", "16", "--seed", "5"], folder)
    images = str(photos)
    return {
        "digits": "digits", "folder": images, "table": str(table), "shards": str(folder / "shards"),
        "finetuned": images, "two-processes": images,
    }  # fmt: skip


def write_images(folder: Path) -> Iterator[dict[str, Any]]:
    """Write images of three classes, and yield the table's row of each.

    A class is the angle of bright bars in noise. Sides are 40 to 120 pixels; two of three images are JPEG, the others PNG;
    every fifth is grey, and every seventh is stored rotated, with an EXIF orientation that rotates it back.
    """
    for label, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for number in range(IMAGES_PER_CLASS):
            random = np.random.default_rng([label, number])
            image = PIL.Image.fromarray(draw(label, random))
            image = image.convert("L") if number % 5 == 4 else image
            exif = PIL.Image.Exif()
            if number % 7 == 6:
                image = image.transpose(PIL.Image.Transpose.ROTATE_90)
                exif[274] = 6  # shown after a clockwise rotation by 90°
            path = folder / name / f"{number:02d}.{'png' if number % 3 == 2 else 'jpg'}"
            image.save(path, exif=exif, **({"quality": 90} if path.suffix == ".jpg" else {}))
            yield {
                "path": f"{folder.name}/{name}/{path.name}",
                "label": name,
                "split": "test" if number < 3 else "train",
                "group": f"{name}-{number // 3}",
            }


def draw(label: int, random: np.random.Generator) -> np.ndarray:
    """Return a colour image whose class is the angle of its bars."""
    height, width = random.integers(40, 121, 2)
    rows, columns = np.mgrid[:height, :width]
    across = (rows, rows + columns, columns)[label]
    bars = ((across + random.integers(0, 100)) // random.integers(6, 14)) % 3 == 0
    pixels = random.integers(0, 90, (height, width, 3), dtype=np.uint8)
    pixels[bars] += random.integers(80, 160, 3, dtype=np.uint8)
    return pixels


def vitrail(arguments: list[str], folder: Path, *, num_processes: int = 1) -> None:
    """Run a command of Vitrail with one thread a process and nothing cached from elsewhere.

    Raises:
        SystemExit: it failed; its output is printed.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes)]
    command = [sys.executable, *(launcher if num_processes > 1 else []), "-m", "vitrail", *arguments]
    own = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(tree())}
    environment = {**os.environ, **own, "VITRAIL_CACHE": str(folder / "cache")}
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stdout, done.stderr, sep="\n", file=sys.stderr)
        sys.exit(f"exit code {done.returncode}: {' '.join(command)}")


def tree() -> Path:
    """Return the folder that `vitrail` is imported from here; the commands run in another folder, but from that tree."""
    spec = importlib.util.find_spec("vitrail")
    if spec is None or spec.origin is None:
        sys.exit("vitrail cannot be imported; set PYTHONPATH to the tree to be hashed")
    return Path(spec.origin).resolve().parents[1]


def hash_weights(path: Path) -> str:
    """Return a hash of the tensors in a `.safetensors` file, whatever their order and the file's metadata."""
    content = path.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:begin])
    header.pop("__metadata__", None)
    digest = hashlib.sha256()
    for name in sorted(header):
        first, last = header[name]["data_offsets"]
        digest.update(f"{name} {header[name]['dtype']} {header[name]['shape']}\n".encode())
        digest.update(content[begin + first : begin + last])
    return digest.hexdigest()[:16]


def hash_metrics(run: Path) -> str:
    """Return a hash of what a run logged of its losses and evaluations, times left out."""
    digest = hashlib.sha256()
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        values = json.loads(line)
        hashed = {key: values[key] for key in sorted(values) if key == "train/loss" or key.startswith("eval/")}
        digest.update(f"{values['step']} {json.dumps(hashed)}\n".encode())
    return digest.hexdigest()[:16]


def compare(hashes: dict[str, dict[str, str]], earlier: dict[str, dict[str, str]]) -> int:
    """Print which hashes changed; returns 1 if any did."""
    changed = [
        f"{name} {kind}: {earlier.get(name, {}).get(kind)} → {value}"
        for name, values in hashes.items()
        for kind, value in values.items()
        if earlier.get(name, {}).get(kind) != value
    ]
    print("\n".join(["changed:", *changed]) if changed else "all as they were")
    return int(bool(changed))


if __name__ == "__main__":
    main()
