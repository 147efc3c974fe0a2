"""A local model leaves PyTorch: ONNX Runtime computes what the model computes, at any batch size."""

import subprocess
import sys

import pytest

PROGRAM = """
import sys, torch, onnxruntime
from torch.testing import assert_close
from vitrail import ViT, ViTConfig
shape = dict(image_size=72, patch_size=8, embed_dim=24, num_heads=2, depth=2, num_classes=5)
for changes in (
    dict(attention="local", window=3, num_registers=1),
    dict(attention="local,global", window=5, positions="rope2d", decoder="mean", class_token=False),
):
    torch.manual_seed(0)
    model = ViT(ViTConfig(**shape, **changes)).eval()
    torch.nn.init.normal_(model.blocks[0].attn.qkv.weight, std=0.5)  # so that who attends to whom shows
    images = torch.rand(2, 3, 72, 72)
    batch = ({0: torch.export.Dim("B")},)
    torch.onnx.export(model, (images,), sys.argv[1], dynamic_shapes=batch, verbose=False, external_data=False)
    session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
    for count in (1, 2, 5):
        images = torch.rand(count, 3, 72, 72)
        (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        assert_close(torch.from_numpy(found), model(images), atol=1e-5, rtol=1e-5)
print("agreed")
"""


@pytest.mark.slow
def test_local_attention_exports_to_onnx(tmp_path):
    # In a process of its own: the executed shape annotations of the tests are no part of what users export.
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, str(tmp_path / "model.onnx")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.strip().endswith("agreed"), done.stderr[-3000:]
