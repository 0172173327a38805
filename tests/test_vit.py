"""The network is what the layer table says it is."""

import math

import pytest
import torch
import torch.nn.functional as F

import vit
from kernels import cpu, plain
from vit import ViT, cost

# The layer table: operation's weights in order, (name, shape).
STEM = [
    ("stem.conv1.weight", (32, 3, 3, 3)),
    ("stem.conv1.bias", (32,)),
    ("stem.conv2.weight", (32, 32, 2, 2)),
    ("stem.conv2.bias", (32,)),
    ("stem.project.weight", (64, 256)),
    ("stem.project.bias", (64,)),
]
BLOCK = [
    ("attention.norm.weight", (64,)),
    ("attention.norm.bias", (64,)),
    ("attention.qkv.weight", (192, 64)),
    ("attention.out.weight", (64, 64)),
    ("feed_forward.norm.weight", (64,)),
    ("feed_forward.norm.bias", (64,)),
    ("feed_forward.linear1.weight", (64, 64)),
    ("feed_forward.linear1.bias", (64,)),
    ("feed_forward.linear2.weight", (64, 64)),
    ("feed_forward.linear2.bias", (64,)),
]
HEAD = [("norm.weight", (64,)), ("norm.bias", (64,)), ("head.weight", (10, 64)), ("head.bias", (10,))]


def by_hand(w, images):
    """The network in float64 with nothing but sums, products and loops over heads, from the layer table."""

    def gelu(x):
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * w[name + "weight"] + w[name + "bias"]

    padded = F.pad(images, (1, 1, 1, 1))
    maps = w["stem.conv1.bias"].view(1, -1, 1, 1)
    for y in range(3):
        for x in range(3):
            maps = maps + torch.einsum("bchw,oc->bohw", padded[:, :, y : y + 32, x : x + 32], w["stem.conv1.weight"][:, :, y, x])
    maps = gelu(maps)
    half = w["stem.conv2.bias"].view(1, -1, 1, 1)
    for y in range(2):
        for x in range(2):
            half = half + torch.einsum("bchw,oc->bohw", maps[:, :, y::2, x::2], w["stem.conv2.weight"][:, :, y, x])
    tokens = torch.einsum("bcp,op->bco", gelu(half).flatten(2), w["stem.project.weight"]) + w["stem.project.bias"]
    x = torch.cat([w["cls_token"].expand(len(images), 1, 64), tokens], 1) + w["pos_embedding"]
    for i in range(2):
        name = f"blocks.{i}.attention."
        qkv = norm(x, name + "norm.") @ w[name + "qkv.weight"].T
        heads = []
        for h in range(4):
            q, k, v = (qkv[:, :, 64 * part + 16 * h : 64 * part + 16 * h + 16] for part in range(3))
            scores = (torch.einsum("bid,bjd->bij", q, k) / 4).exp()
            heads.append(torch.einsum("bij,bjd->bid", scores / scores.sum(-1, keepdim=True), v))
        x = x + torch.cat(heads, -1) @ w[name + "out.weight"].T
        name = f"blocks.{i}.feed_forward."
        hidden = gelu(norm(x, name + "norm.") @ w[name + "linear1.weight"].T + w[name + "linear1.bias"])
        x = x + hidden @ w[name + "linear2.weight"].T + w[name + "linear2.bias"]
    return norm(x[:, 0], "norm.") @ w["head.weight"].T + w["head.bias"]


def test_parameters_are_those_of_the_layer_table_in_its_order():
    named = {name: tuple(p.shape) for name, p in ViT().named_parameters()}
    assert named.pop("cls_token") == (1, 1, 64)
    assert named.pop("pos_embedding") == (1, 33, 64)
    blocks = [(f"blocks.{i}.{name}", shape) for i in range(2) for name, shape in BLOCK]
    assert list(named.items()) == STEM + blocks + HEAD
    assert sum(math.prod(shape) for shape in named.values()) == 72_170


def test_forward_is_the_layer_table_by_hand():
    torch.manual_seed(0)
    model = ViT().double()
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    expected = by_hand(dict(model.named_parameters()), images)
    assert torch.allclose(model(images), expected, rtol=0, atol=1e-12)


def test_cost_is_measured_and_adds_up():
    rows = cost(ViT())
    assert sum(row["parameters"] for row in rows) == 74_346
    macs = {row["name"]: row["macs"] for row in rows}
    assert macs["stem.conv1"] == 32 * 32 * 32 * 27
    assert macs["stem.conv2"] == 16 * 16 * 32 * 128
    assert macs["blocks.0.attention.attend"] == 2 * 4 * 33 * 33 * 16  # scores and values
    assert sum(macs.values()) == 4_359_040
    assert [row["shape"] for row in rows if row["name"] == "cls_token, pos_embedding"] == [(33, 64)]


def test_cost_follows_the_module_and_leaves_no_hooks():
    model = ViT(num_classes=100, depth=1)
    rows = cost(model)
    assert [row["parameters"] for row in rows if row["name"] == "head"] == [6_500]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_script_prints_the_totals(invoke):
    status, table, _ = invoke(vit, [])
    assert status == 0 and "72,170" in table and "74,346" in table and "4,359,040" in table


@pytest.mark.parametrize(
    "sizes, told",
    [
        ({"image_size": 33}, "image_size 33"),
        ({"depth": 0}, "depth is 0"),
        ({"heads": -1}, "heads is -1"),
        ({"dim": 6.5}, "dim is 6.5"),
        ({"num_classes": True}, "num_classes is True"),
    ],
)
def test_sizes_that_do_not_fit_are_named(sizes, told):
    with pytest.raises(ValueError, match=told):
        ViT(**sizes)


def test_pictures_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 1, 32, 32\).*\(B, 3, 32, 32\)"):
        ViT()(torch.zeros(2, 1, 32, 32))


OTHER_SIZES = [
    {},
    {"patch_size": 4, "image_size": 16, "in_channels": 1, "channels": 8, "dim": 24, "heads": 3, "dim_head": 5, "depth": 1, "num_classes": 3},
    {"patch_size": 1, "image_size": 4, "depth": 3, "mlp_dim": 7},
]


@pytest.mark.parametrize("sizes", OTHER_SIZES)
@pytest.mark.parametrize("batch", [1, 5])
def test_cpu_spelling_is_the_same_function_with_the_same_gradients(sizes, batch):
    torch.manual_seed(0)
    model = ViT(**sizes).double()
    side = model.sizes["image_size"]
    images = torch.randn(batch, model.sizes["in_channels"], side, side, dtype=torch.float64)
    expected, got = plain.forward(model, images), cpu.forward(model, images)
    assert torch.allclose(got, expected, rtol=0, atol=1e-12)
    upstream = torch.randn_like(expected)
    weights = dict(model.named_parameters())
    gradients = [torch.autograd.grad(logits, list(weights.values()), upstream) for logits in (expected, got)]
    for name, a, b in zip(weights, *gradients):
        assert torch.allclose(a, b, rtol=0, atol=1e-11), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cpu_spelling_errs_no_more_than_the_plain_one(dtype):
    """Error against float64, logits at most 2x and gradients 3x the plain spelling's in the same dtype."""
    torch.manual_seed(0)
    model = ViT().double()
    images = torch.randn(64, 3, 32, 32, dtype=torch.float64)
    upstream = torch.randn(64, 10, dtype=torch.float64)

    def run(forward, to):
        logits = forward(model, images.to(to))
        gradients = torch.autograd.grad(logits, list(model.parameters()), upstream.to(to))
        return logits.detach().double(), torch.cat([g.flatten() for g in gradients])

    exact, theirs, ours = run(plain.forward, torch.float64), run(plain.forward, dtype), run(cpu.forward, dtype)
    for want, plainly, fast, factor in zip(exact, theirs, ours, (2, 3)):
        assert (fast - want).norm() <= factor * (plainly - want).norm()
