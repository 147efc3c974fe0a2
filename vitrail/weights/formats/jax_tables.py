"""Tables of the names and tensor layouts in google-research/vision_transformer and google-research/big_vision.

Both are Flax's: linear layers [in, out], heads apart as [D, K, d] and [K, d, D], convolutions [H, W, in, out].
"""

from __future__ import annotations

from einops import rearrange

from vitrail.weights.key_mapping import Rule, TensorLayout

LINEAR = TensorLayout(lambda x, config: x.T, lambda x, config: x.T)
CONV = TensorLayout(lambda x, config: x.permute(3, 2, 0, 1), lambda x, config: x.permute(2, 3, 1, 0))
NORM = TensorLayout(lambda x, config: x.flatten(), lambda x, config: x.view(1, 1, 1, -1))  # group norms of the hybrids
INTO_HEADS = TensorLayout(
    lambda x, config: rearrange(x, "D K d -> (K d) D"),
    lambda x, config: rearrange(x, "(K d) D -> D K d", K=config.num_heads),
)
BIAS_OF_HEADS = TensorLayout(
    lambda x, config: rearrange(x, "K d -> (K d)"), lambda x, config: rearrange(x, "(K d) -> K d", K=config.num_heads)
)
OUT_OF_HEADS = TensorLayout(
    lambda x, config: rearrange(x, "K d D -> D (K d)"),
    lambda x, config: rearrange(x, "D (K d) -> K d D", K=config.num_heads),
)


def _attention(theirs: str, query: str, key: str, value: str, out: str) -> tuple[Rule, ...]:
    """Return the rules for Flax's MultiHeadDotProductAttention."""
    inputs = {"query": query, "key": key, "value": value}
    names = {part: (ours.replace("{p}", "weight"), ours.replace("{p}", "bias")) for part, ours in inputs.items()}
    return (
        *(Rule(f"{theirs}/{part}/kernel", weight, INTO_HEADS) for part, (weight, _) in names.items()),
        *(Rule(f"{theirs}/{part}/bias", bias, BIAS_OF_HEADS) for part, (_, bias) in names.items()),
        Rule(f"{theirs}/out/kernel", f"{out}.weight", OUT_OF_HEADS),
        Rule(f"{theirs}/out/bias", f"{out}.bias"),
    )


def _norm(theirs: str, ours: str) -> tuple[Rule, ...]:
    return Rule(f"{theirs}/scale", f"{ours}.weight"), Rule(f"{theirs}/bias", f"{ours}.bias")


def _dense(theirs: str, ours: str) -> tuple[Rule, ...]:
    return Rule(f"{theirs}/kernel", f"{ours}.weight", LINEAR), Rule(f"{theirs}/bias", f"{ours}.bias")


def _blocks(norm2: str, attention: str, mlp: str) -> tuple[Rule, ...]:
    """Return the rules for a block; the two repositories number its modules differently."""
    theirs, ours = "Transformer/encoderblock_{i}", "blocks.{i}"
    query, key, value = (f"{ours}.attn.qkv.{{p}}/{part}" for part in range(3))
    return (
        *_norm(f"{theirs}/LayerNorm_0", f"{ours}.norm1"),
        *_norm(f"{theirs}/{norm2}", f"{ours}.norm2"),
        *_attention(f"{theirs}/{attention}", query, key, value, f"{ours}.attn.proj"),
        *_dense(f"{theirs}/{mlp}/Dense_0", f"{ours}.mlp.fc1"),
        *_dense(f"{theirs}/{mlp}/Dense_1", f"{ours}.mlp.fc2"),
    )


def _resnet() -> tuple[Rule, ...]:
    """Return the rules for the hybrids' ResNet, whose stages count from 1 there and from 0 here."""
    ours = "patch_embed.backbone"
    rules = [
        Rule("conv_root/kernel", f"{ours}.stem.conv.weight", CONV),
        Rule("gn_root/scale", f"{ours}.stem.norm.weight", NORM),
        Rule("gn_root/bias", f"{ours}.stem.norm.bias", NORM),
    ]
    for stage in range(4):
        for block in range(9):
            their_block = f"block{stage + 1}/unit{block + 1}"
            our_block = f"{ours}.stages.{stage}.blocks.{block}"
            layers = {str(number): (f"conv{number}", f"norm{number}") for number in (1, 2, 3)}
            layers["_proj"] = ("downsample.conv", "downsample.norm")
            for number, (conv, norm) in layers.items():
                rules += [
                    Rule(f"{their_block}/conv{number}/kernel", f"{our_block}.{conv}.weight", CONV),
                    Rule(f"{their_block}/gn{number}/scale", f"{our_block}.{norm}.weight", NORM),
                    Rule(f"{their_block}/gn{number}/bias", f"{our_block}.{norm}.bias", NORM),
                ]
    return tuple(rules)


_SHARED = (
    Rule("cls", "cls_token"),
    Rule("embedding/kernel", "patch_embed.proj.weight", CONV),
    Rule("embedding/bias", "patch_embed.proj.bias"),
    *_norm("Transformer/encoder_norm", "norm"),
    *_dense("head", "head"),
)
_POOL = "decoder.attn_pool"
_MAP_HEAD = (
    Rule("MAPHead_0/probe", f"{_POOL}.latent"),
    *_attention(
        "MAPHead_0/MultiHeadDotProductAttention_0", f"{_POOL}.q.{{p}}", f"{_POOL}.kv.{{p}}/0", f"{_POOL}.kv.{{p}}/1",
        f"{_POOL}.proj",
    ),
    *_norm("MAPHead_0/LayerNorm_0", f"{_POOL}.norm"),
    *_dense("MAPHead_0/MlpBlock_0/Dense_0", f"{_POOL}.mlp.fc1"),
    *_dense("MAPHead_0/MlpBlock_0/Dense_1", f"{_POOL}.mlp.fc2"),
)  # fmt: skip
VISION_TRANSFORMER = (
    *_SHARED,
    Rule("Transformer/posembed_input/pos_embedding", "pos_embed"),
    *_blocks("LayerNorm_2", "MultiHeadDotProductAttention_1", "MlpBlock_3"),
    *_resnet(),
)
BIG_VISION = (
    *_SHARED,
    Rule("pos_embedding", "pos_embed"),
    *_blocks("LayerNorm_1", "MultiHeadDotProductAttention_0", "MlpBlock_0"),
    *_MAP_HEAD,
)
