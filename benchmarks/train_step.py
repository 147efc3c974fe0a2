"""Training step of a ViT: Vitrail against timm, transformers and vit-pytorch on this machine.

Forward, cross-entropy, backward, clip, AdamW step, on random images that are in memory already. Same architecture,
batch and number format; the libraries take turns, round by round. Prints images/s (median over rounds, minimum and
maximum) and the ratio of Vitrail to each peer, paired by round.

    python benchmarks/train_step.py [--rounds 5] [--batch 32] [--size 224] [--patch 16] [--width 192] [--heads 3] [--depth 12]
    python benchmarks/train_step.py --drop-path 0.4    # stochastic depth, against timm
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import platform
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.config import OptimConfig
from vitrail.device import supports_bf16
from vitrail.machine import processor_name
from vitrail.models.config import ViTConfig
from vitrail.models.vit import ViT
from vitrail.optim.optimizers import build_optimizer, clip_gradient

CLASSES = 1000


def main() -> None:
    """Measure every number format that this machine computes."""
    args = arguments()
    packages = ("torch", "timm", "transformers", "vit-pytorch")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    print(f"{processor_name()}, {torch.get_num_threads()} threads, {platform.system()}; {versions}")
    print(
        f"image {args.size}, patch {args.patch}, width {args.width}, depth {args.depth}, batch {args.batch}, drop path {args.drop_path}\n"
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for bf16 in (False, True):
        if bf16 and not supports_bf16(device):
            print("bf16: not computed natively here")
            continue
        measure("bf16" if bf16 else "fp32", args, device, bf16)


def measure(name: str, args: argparse.Namespace, device: torch.device, bf16: bool) -> None:
    """Time the libraries in turn, round by round, and print medians and ratios."""
    steps = {
        library: make_step(build(args).to(device).train(), library, args, device, bf16)
        for library, build in PEERS.items()
        if not args.drop_path or library in ("vitrail", "timm")  # the others have no stochastic depth
    }
    for step in steps.values():
        step(), step()
    speeds: dict[str, list[float]] = {library: [] for library in steps}
    for _ in range(args.rounds):
        for library, step in steps.items():
            started = time.perf_counter()
            for _ in range(args.steps):
                step()
            speeds[library].append(args.steps * args.batch / (time.perf_counter() - started))
    for library, values in speeds.items():
        line = (
            f"{name}  {library:<13}{statistics.median(values):8.1f} images/s ({min(values):.1f} to {max(values):.1f})"
        )
        if library != "vitrail":
            ratios = [ours / theirs for ours, theirs in zip(speeds["vitrail"], values, strict=True)]
            spread = f"{min(ratios):.2f} to {max(ratios):.2f}, n = {args.rounds}"
            line += f"   vitrail/{library}: {statistics.median(ratios):.2f} ({spread})"
        print(line)


def make_step(
    model: nn.Module, library: str, args: argparse.Namespace, device: torch.device, bf16: bool
) -> Callable[[], None]:
    """Return one optimizer step as a user of the library would write it; Vitrail's is its own loop's."""
    torch.manual_seed(0)
    images = torch.randn(args.batch, 3, args.size, args.size, device=device)
    targets = torch.randint(CLASSES, (args.batch,), device=device)
    ours = library == "vitrail"
    optimizer = build_optimizer(model, OptimConfig()) if ours else torch.optim.AdamW(model.parameters(), lr=1e-3)

    def logits() -> Tensor:
        out = model(images)
        return out.logits if hasattr(out, "logits") else out

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16) if bf16 else contextlib.nullcontext():
            loss = F.cross_entropy(logits().float(), targets)
        loss.backward()
        clip_gradient(model, 1.0) if ours else nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step


def vitrail(args: argparse.Namespace) -> nn.Module:
    """Return Vitrail's ViT."""
    return ViT(
        ViTConfig(
            image_size=args.size, patch_size=args.patch, embed_dim=args.width, depth=args.depth, num_heads=args.heads,
            drop_path=args.drop_path,
        )
    )  # fmt: skip


def timm(args: argparse.Namespace) -> nn.Module:
    """Return timm's VisionTransformer."""
    import timm

    return timm.models.VisionTransformer(
        img_size=args.size, patch_size=args.patch, embed_dim=args.width, depth=args.depth, num_heads=args.heads,
        drop_path_rate=args.drop_path,
    )  # fmt: skip


def transformers(args: argparse.Namespace) -> nn.Module:
    """Return transformers' ViTForImageClassification, with its default attention."""
    from transformers import ViTConfig as Config
    from transformers import ViTForImageClassification

    config = Config(
        image_size=args.size, patch_size=args.patch, hidden_size=args.width, num_hidden_layers=args.depth,
        num_attention_heads=args.heads, intermediate_size=4 * args.width, num_labels=CLASSES,
    )  # fmt: skip
    return ViTForImageClassification(config)


def vit_pytorch(args: argparse.Namespace) -> nn.Module:
    """Return vit-pytorch's ViT."""
    from vit_pytorch import ViT as Peer

    return Peer(
        image_size=args.size, patch_size=args.patch, num_classes=CLASSES, dim=args.width, depth=args.depth,
        heads=args.heads, mlp_dim=4 * args.width,
    )  # fmt: skip


PEERS = {"vitrail": vitrail, "timm": timm, "transformers": transformers, "vit-pytorch": vit_pytorch}


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        ("rounds", 5), ("steps", 3), ("batch", 32), ("size", 224), ("patch", 16), ("width", 192), ("heads", 3), ("depth", 12)
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--drop-path", type=float, default=0.0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
