"""Tables of names: the same rules in both directions."""

import pytest
import torch

from vitrail.models.config import ViTConfig
from vitrail.weights.imported_model import LoadReport
from vitrail.weights.key_mapping import Rule, TensorLayout, to_ours, to_theirs

CONFIG = ViTConfig(embed_dim=4, num_heads=2, depth=1)
TRANSPOSED = TensorLayout(lambda x, config: x.T, lambda x, config: x.T)
RULES = [
    Rule("layer.{i}.query.{p}", "blocks.{i}.attn.qkv.{p}/0"),
    Rule("layer.{i}.key.weight", "blocks.{i}.attn.qkv.weight/1"),
    Rule("", "blocks.{i}.attn.qkv.bias/1"),
    Rule("layer.{i}.value.{p}", "blocks.{i}.attn.qkv.{p}/2"),
    Rule("layer.{i}.dense.kernel", "blocks.{i}.mlp.fc1.weight", TRANSPOSED),
    Rule("head.{p}", "head.{p}"),
]


def theirs() -> dict[str, torch.Tensor]:
    tensors = {f"layer.{i}.{part}.weight": torch.randn(4, 4) for i in (0, 11) for part in ("query", "key", "value")}
    tensors |= {f"layer.{i}.{part}.bias": torch.randn(4) for i in (0, 11) for part in ("query", "value")}
    return tensors | {"layer.0.dense.kernel": torch.randn(4, 8), "head.weight": torch.randn(3, 4)}


def test_to_ours_and_back():
    before = theirs()
    ours, unknown = to_ours(before, RULES, CONFIG)
    assert not unknown
    assert ours["blocks.0.mlp.fc1.weight"].shape == (8, 4)
    parts = [before["layer.11.query.bias"], torch.zeros(4), before["layer.11.value.bias"]]
    assert torch.equal(ours["blocks.11.attn.qkv.bias"], torch.cat(parts))
    parts = [before[f"layer.11.{part}.weight"] for part in ("query", "key", "value")]
    assert torch.equal(ours["blocks.11.attn.qkv.weight"], torch.cat(parts))
    after, unknown = to_theirs(ours, RULES, CONFIG)
    assert not unknown
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_names_that_no_rule_matches_are_returned():
    assert to_ours({"layer.0.mask": torch.zeros(1)}, RULES, CONFIG) == ({}, ["layer.0.mask"])
    assert to_theirs({"blocks.0.ls1.gamma": torch.zeros(1)}, RULES, CONFIG) == ({}, ["blocks.0.ls1.gamma"])


def test_a_missing_part_of_a_joined_weight_is_an_error():
    tensors = theirs()
    del tensors["layer.11.key.weight"]
    with pytest.raises(ValueError, match=r"layer\.11\.key\.weight: is missing"):
        to_ours(tensors, RULES, CONFIG)


def test_a_report_says_what_differs_and_nothing_else():
    assert LoadReport("a.pth", loaded=5).lines() == ["a.pth: 5 weights loaded"]
    report = LoadReport(
        "a.pth", loaded=5, head="new, 2 classes instead of 3", unexpected=tuple(f"w{i}" for i in range(10))
    )
    assert report.lines()[1:] == [
        "  head: new, 2 classes instead of 3",
        "  unexpected (left out): w0, w1, w2, w3, w4, w5, w6, w7 and 2 more",
    ]


def test_the_rest_of_a_name_may_have_points_and_is_no_part():
    rules = [Rule("attn_pool.{rest}", "pool.{rest}"), Rule("blocks.{i}.{rest}", "blocks.{i}.{rest}")]
    before = {"attn_pool.mlp.fc1.weight": torch.randn(2, 3), "blocks.3.attn.qkv.weight": torch.randn(6, 2)}
    ours, unknown = to_ours(before, rules, CONFIG)
    assert not unknown
    assert ours.keys() == {"pool.mlp.fc1.weight", "blocks.3.attn.qkv.weight"}
    after, lost = to_theirs(ours, rules, CONFIG)
    assert not lost
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("part", ["", "/1"])
def test_two_names_for_one_weight_are_an_error(part):
    rules = [Rule("new.{p}", f"norm.{{p}}{part}"), Rule("old.{p}", f"norm.{{p}}{part}"), Rule("a.{p}", "norm.{p}/0")]
    with pytest.raises(ValueError, match=f"^a.pth: old.weight and new.weight are both our norm.weight{part}"):
        to_ours({"old.weight": torch.ones(2), "new.weight": torch.zeros(2)}, rules, CONFIG, "a.pth")
