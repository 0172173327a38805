"""The network is what the layer table says, and so is its stem as matrix products."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

import vit
from kernels.matmul_stem import MatmulStem
from recipes import RECIPES
from runtime import Runtime
from vit import Stem, ViT, build_model, summary


def by_hand(w, images):
    """The layer table in sums, products and loops over heads, every token in every block."""

    def gelu(x):
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))

    def norm(x, name):
        centered = x - x.mean(-1, keepdim=True)
        std = (centered.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        return centered / std * w[name + "weight"] + w[name + "bias"]

    # conv1: nine shifted images, each times a matrix
    padded = F.pad(images, (1, 1, 1, 1))
    maps = w["stem.conv1.bias"].view(1, -1, 1, 1)
    for y in range(3):
        for x in range(3):
            pixels = padded[:, :, y : y + 32, x : x + 32]
            weight = w["stem.conv1.weight"][:, :, y, x]
            maps = maps + torch.einsum("bchw,oc->bohw", pixels, weight)
    maps = gelu(maps)

    # conv2: four of every 2x2 pixels, each times a matrix
    half = w["stem.conv2.bias"].view(1, -1, 1, 1)
    for y in range(2):
        for x in range(2):
            weight = w["stem.conv2.weight"][:, :, y, x]
            half = half + torch.einsum("bchw,oc->bohw", maps[:, :, y::2, x::2], weight)
    tokens = gelu(half).flatten(2) @ w["stem.proj.weight"].T + w["stem.proj.bias"]
    x = torch.cat([w["cls_token"].expand(len(images), 1, 64), tokens], 1) + w["pos_embedding"]

    for i in range(2):
        name = f"blocks.{i}.attention."
        qkv = norm(x, name + "norm.") @ w[name + "qkv.weight"].T
        heads = []
        for h in range(4):
            q, k, v = (qkv[:, :, 64 * j + 16 * h : 64 * j + 16 * h + 16] for j in range(3))
            scores = (torch.einsum("bid,bjd->bij", q, k) / 4).exp()
            heads.append(scores / scores.sum(-1, keepdim=True) @ v)
        x = x + torch.cat(heads, -1) @ w[name + "out.weight"].T
        name = f"blocks.{i}.mlp."
        hidden = norm(x, name + "norm.") @ w[name + "linear1.weight"].T + w[name + "linear1.bias"]
        x = x + gelu(hidden) @ w[name + "linear2.weight"].T + w[name + "linear2.bias"]
    return norm(x[:, 0], "norm.") @ w["head.weight"].T + w["head.bias"]


@pytest.mark.parametrize("stem", ["convolutions", "matmul"])
def test_forward_and_gradients_equal_the_layer_table_by_hand(stem):
    """The last block computes the CLS token only, which changes no logit and no gradient."""
    torch.manual_seed(0)
    model = ViT().double()
    if stem == "matmul":
        model.stem = MatmulStem(model.stem)
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    weights = dict(model.named_parameters())
    expected = by_hand(weights, images)
    logits = model(images)
    assert torch.allclose(logits, expected, rtol=0, atol=1e-12)
    upstream = torch.randn_like(expected)
    params = list(weights.values())
    expected_grads = torch.autograd.grad(expected, params, upstream)
    grads = torch.autograd.grad(logits, params, upstream)
    for name, actual, grad in zip(weights, grads, expected_grads):
        assert torch.allclose(actual, grad, rtol=0, atol=1e-11), name


OTHER_SIZES = [
    dict(patch_size=4, image_size=16, in_channels=1, channels=8, dim=24, heads=3, dim_head=5),
    dict(patch_size=1, image_size=4, depth=3, mlp_dim=7, num_classes=3),
]


@pytest.mark.parametrize("config", OTHER_SIZES)
@pytest.mark.parametrize("batch", [0, 1, 5])
def test_both_forms_of_the_stem_agree_at_other_sizes(config, batch):
    torch.manual_seed(0)
    stem = ViT(**config).double().stem
    side = config["image_size"]
    images = torch.randn(batch, config.get("in_channels", 3), side, side, dtype=torch.float64)
    assert torch.allclose(stem(images), MatmulStem(stem)(images), rtol=0, atol=1e-12)


def test_the_matmul_stem_has_the_parameters_of_the_stem():
    """In the same order, so that optimizers and checkpoints do not see a difference."""
    model = ViT()
    before = dict(model.named_parameters())
    Runtime("cpu", kernels="torch").prepare(model)
    assert isinstance(model.stem, Stem)
    Runtime("cpu").prepare(model)
    assert isinstance(model.stem, MatmulStem)
    after = dict(model.named_parameters())
    assert list(before) == list(after)
    assert all(before[name] is after[name] for name in before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stem_as_matmul_is_as_accurate_as_convolutions(dtype):
    """Errors against float64 are at most 2x (gradients 3x) those of the convolutions."""
    torch.manual_seed(0)
    model = ViT().double()
    images = torch.randn(16, 3, 32, 32, dtype=torch.float64)
    upstream = torch.randn(16, 10, dtype=torch.float64)

    def run(dtype, as_matmul):
        inner = copy.deepcopy(model).to(dtype)
        if as_matmul:
            inner.stem = MatmulStem(inner.stem)
        logits = inner(images.to(dtype))
        grads = torch.autograd.grad(logits, list(inner.stem.parameters()), upstream.to(dtype))
        grads = torch.cat([grad.flatten() for grad in grads])
        return logits.detach().double(), grads.double()

    exact_logits, exact_grads = run(torch.float64, as_matmul=False)
    logits, grads = run(dtype, as_matmul=True)
    conv_logits, conv_grads = run(dtype, as_matmul=False)
    assert (logits - exact_logits).norm() <= 2 * (conv_logits - exact_logits).norm()
    assert (grads - exact_grads).norm() <= 3 * (conv_grads - exact_grads).norm()


def test_script_prints_shapes_parameters_and_macs(succeeds):
    table = succeeds(vit, [])
    rows = {line.split()[0]: line.split()[-2:] for line in table.splitlines()}
    assert rows["stem.conv1"] == ["896", f"{32 * 32 * 32 * 27:,}"]
    assert rows["blocks.0.attention.attend"] == ["0", f"{2 * 4 * 33 * 33 * 16:,}"]  # scores, values
    assert rows["all"] == ["72,170", "3,699,584"]
    assert rows["and"][1] == "74,346"
    assert " 6,500 " in succeeds(vit, ["--classes", 100])
    model = ViT()
    assert summary(model) + "\n" == table
    assert not any(module._forward_hooks for module in model.modules())


def test_invalid_sizes_and_images_are_named():
    for name, value in (("image_size", 33), ("depth", 0), ("dim", 6.5), ("num_classes", True)):
        with pytest.raises(ValueError, match=f"{name} (is )?{value}"):
            ViT(**{name: value})
    with pytest.raises(ValueError, match=r"\(2, 1, 32, 32\).*\(B, 3, 32, 32\)"):
        ViT()(torch.zeros(2, 1, 32, 32))


def test_recipes_initialize_the_network():
    """Embeddings scaled, the projection an average over 2x2 cells of the same norm, no more."""
    before = torch.random.get_rng_state()
    plain = build_model(RECIPES["original"], 10, 1, "cpu")
    pooled = build_model(RECIPES["default"], 10, 1, "cpu")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(pooled.cls_token, plain.cls_token * 0.2)
    maps = torch.randn(2, 32, 16, 16)
    weight = pooled.stem.proj.weight.detach()
    cells = F.avg_pool2d(maps, 2).flatten(2)
    projected = maps.flatten(2) @ weight.T
    assert torch.allclose(projected, cells * (projected.norm() / cells.norm()), atol=1e-4)
    assert weight.norm().item() == pytest.approx(plain.stem.proj.weight.norm().item(), rel=1e-4)
    changed = {"cls_token", "pos_embedding", "stem.proj.weight"}
    for (name, p), q in zip(pooled.named_parameters(), plain.parameters()):
        assert torch.equal(p, q) == (name not in changed)
