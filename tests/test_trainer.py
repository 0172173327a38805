"""The training step against a plain loop, its state, and checkpoints, corrupted and hostile."""

import copy
import dataclasses
import math
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import Malicious, corrupted, make_trainer, save_small_checkpoint, small_recipe
from conftest import tampered

import data
import evaluate
import train
from cli import RunError, UsageError, sha256
from schedule import RECIPES
from trainer import build_model, load_checkpoint

# --- the step ---


@pytest.mark.parametrize("kernels", ["torch", "auto"])
def test_two_epochs_equal_the_plain_loop(small, kernels):
    """With autograd's L1 term, torch's own scheduler and the module called as it is."""
    recipe = small_recipe(max_lr=0.003)
    trainer = make_trainer(small, recipe, precision="fp32", kernels=kernels)
    plain = build_model(recipe, small.num_classes, 1, "cpu")
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1.0, betas=(0.9, 0.999), weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.003, total_steps=6, pct_start=5 / 24, div_factor=10, final_div_factor=10,
        anneal_strategy="linear",
    )  # fmt: skip
    for epoch in range(2):
        loss, accuracy = trainer.train_epoch(3)
        total, correct = 0.0, 0
        for indices in trainer.plan.indices.split(128):
            logits = plain(trainer.normalize(small.train_images[indices]))
            labels = small.train_labels[indices]
            cross_entropy = F.cross_entropy(logits, labels)
            optimizer.zero_grad()
            (cross_entropy + 2.5e-5 * sum(p.abs().sum() for p in plain.parameters())).backward()
            optimizer.step()
            if scheduler.last_epoch < 5:
                scheduler.step()
            total += cross_entropy.item() * len(indices)
            correct += (logits.argmax(1) == labels).sum().item()
        assert loss == pytest.approx(total / 300, rel=1e-4)
        assert epoch or accuracy == pytest.approx(100 * correct / 300, abs=0.7)
    for (name, p), q in zip(trainer.model.named_parameters(), plain.parameters()):
        assert torch.allclose(p, q, rtol=0, atol=2e-4), name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_same_seed_same_bits_and_another_seed_others(small, precision):
    recipe = dataclasses.replace(RECIPES["original"], epochs=1, batch_size=32)

    def train_once(seed):
        trainer = make_trainer(small, recipe, seed, precision=precision)
        return sha256([trainer.train_epoch(2), dict(trainer.model.state_dict())])

    assert train_once(1) == train_once(1) != train_once(2)


def test_the_second_loss(small):
    """Of the mean token, at a weight that falls to 0; what is reported is the CLS token's."""
    recipe = small_recipe(epochs=5, aux_weight=0.5, aux_frac=0.8, l1=0.0)
    assert [recipe.aux_weight_of(i) for i in range(5)] == [0.5, 0.375, 0.25, 0.125, 0.0]
    for epoch in (2, 4):
        trainer = make_trainer(small, recipe, precision="fp32")
        model, trainer.epoch = copy.deepcopy(trainer.model), epoch
        loss, accuracy = trainer.train_epoch(1)
        indices = trainer.plan.indices[:128]
        images, labels = small.train_images[indices], small.train_labels[indices]
        cls, mean = model(trainer.normalize(images), mean_token=True).unbind(1)
        expected = F.cross_entropy(cls, labels)
        assert loss == pytest.approx(expected.item(), rel=1e-5)
        correct = (cls.argmax(1) == labels).sum().item()
        assert accuracy == pytest.approx(100 * correct / 128, abs=0.8)
        (expected + recipe.aux_weight_of(epoch) * F.cross_entropy(mean, labels)).backward()
        for p, q in zip(trainer.model.parameters(), model.parameters()):
            assert torch.allclose(p.grad, q.grad, rtol=1e-3, atol=1e-6)


def test_default_recipe_learns(small):
    changes = {"epochs": 10, "batch_size": 50, "flip_p": 0.0, "crop_padding": 0}
    recipe = dataclasses.replace(RECIPES["default"], **changes)
    trainer = make_trainer(small, recipe)
    (first, _), *_, (last, accuracy) = (trainer.train_epoch(6) for _ in range(10))
    assert last < first / 2 and accuracy > 60


def test_averaged_weights_are_a_running_mean(small):
    """Over a fraction of the steps so far; training itself does not change."""
    recipe = small_recipe(weight_avg_frac=0.4, batch_size=50)
    trainer = make_trainer(small, recipe, precision="fp32")
    plain = make_trainer(small, dataclasses.replace(recipe, weight_avg_frac=0), precision="fp32")
    assert plain.averaged_model is plain.model
    params, plain_params = list(trainer.model.parameters()), list(plain.model.parameters())
    mean = [torch.zeros_like(p) for p in plain_params]
    for each in (trainer, plain):
        each.begin_epoch(0, [0.003] * 6, [0.9] * 6)
    for i in range(6):
        trainer.step(i)
        plain.step(i)
        torch._foreach_lerp_(mean, plain_params, min(1, 1 / (0.4 * (i + 1))))
    assert all(map(torch.equal, params, plain_params))
    for averaged, m, p in zip(trainer.averaged_model.parameters(), mean, params):
        assert torch.allclose(averaged, m, rtol=0, atol=1e-6)
        assert not torch.allclose(averaged, p, rtol=0, atol=1e-4)


# --- state ---


@pytest.mark.parametrize("device", ["cpu"] + ["cuda"] * torch.cuda.is_available())
@pytest.mark.parametrize("recipe", ["original", "long"])
def test_a_state_continues_with_the_same_bits(small_shapes, recipe, device):
    """Taken after each step of the second epoch, put into a trainer of another initialization."""
    dataset = data.load("shapes", "", device)
    recipe = dataclasses.replace(RECIPES[recipe], epochs=3, batch_size=128)
    unbroken, states = make_trainer(dataset, recipe, device=device), []
    state_of = lambda trainer: [dict(trainer.averaged_model.state_dict()), trainer.state_dict()]
    take = lambda: states.append(copy.deepcopy(state_of(unbroken)))
    unbroken.train_epoch(3)
    take()
    results = [unbroken.train_epoch(3, take), unbroken.train_epoch(3)]
    assert len(states) == 4
    for averaged, state in states:
        resumed = make_trainer(dataset, recipe, seed=2, device=device)
        resumed.seed = 1
        resumed.averaged_model.load_state_dict(averaged)
        resumed.load_state_dict(state)
        assert [resumed.train_epoch(3) for _ in range(2)] == results
        assert sha256(state_of(unbroken)) == sha256(state_of(resumed))


# --- not finite ---


@pytest.mark.parametrize("bad_tensor", ["the loss", "the gradient of stem.conv2.bias"])
@pytest.mark.parametrize("every_step", [True, False])
def test_what_is_not_finite_is_named(small, monkeypatch, bad_tensor, every_step):
    """On a CPU in its step; elsewhere at the end of the epoch, with the same message."""
    trainer = make_trainer(small, small_recipe())
    trainer.train_epoch(3)
    check, steps = trainer.check_finite, []
    if not every_step:
        at_end = lambda: check() if trainer.step_in_epoch == 3 else None
        monkeypatch.setattr(trainer, "check_finite", at_end)

    def after_step():
        steps.append(trainer.step_in_epoch)
        if len(steps) == 1 and bad_tensor == "the loss":
            trainer.model.cls_token.data.fill_(math.nan)
        elif len(steps) == 1:
            parameter = trainer.model.get_parameter(bad_tensor.split()[-1])
            parameter.register_hook(lambda grad: grad * math.inf)

    message = f"^step 2 of epoch 2, lr {trainer.schedule(4)[0]:.4g}: {bad_tensor} is not finite"
    with pytest.raises(RunError, match=message):
        trainer.train_epoch(3, after_step)
    assert len(steps) == (1 if every_step else 2)
    with pytest.raises(RunError, match=message):
        trainer.state_dict()


@pytest.mark.parametrize("size, finite", [(1e18, 1), (1e20, 0)])
def test_a_gradient_whose_square_overflows_is_not_finite(small, size, finite):
    """AdamW would divide by its square for ever, and the parameter would stand still."""
    trainer = make_trainer(small, small_recipe())
    trainer.model.head.bias.register_hook(lambda grad: grad.sign() * size)
    trainer.begin_epoch(0, [0.0] * 3, [0.9] * 3)
    trainer.torch_step(0)
    *others, last = trainer.finite_counts.tolist()
    assert set(others) == {1} and last == finite


# --- checkpoints ---


@pytest.fixture(scope="module")
def good(small, tmp_path_factory):
    return save_small_checkpoint(tmp_path_factory.mktemp("good") / "best.pt", small)


def test_no_corrupted_checkpoint_is_accepted(good, tmp_path):
    """Of 200, each is refused in a line, or holds what was saved (zip padding was hit)."""
    content, (_, expected) = good.read_bytes(), load_checkpoint(good, "cpu")
    path, refused = tmp_path / "corrupt.pt", 0
    for number in range(200):
        path.write_bytes(corrupted(content, number))
        try:
            model, ckpt = load_checkpoint(path, "cpu")
        except UsageError as error:
            refused += 1
            assert "\n" not in str(error) and "checkpoint" in str(error)
        else:
            assert sha256(ckpt) == sha256(expected), number
            assert sha256(dict(model.state_dict())) == sha256(expected["model"]), number
    assert refused > 140


def test_a_flipped_bit_with_a_valid_zip_is_refused(good, tmp_path):
    ckpt = torch.load(good, weights_only=True)
    ckpt["model"]["cls_token"].view(torch.int32)[0, 0, 5] ^= 4
    torch.save(ckpt, tmp_path / "flipped.pt")  # torch sees nothing wrong
    with pytest.raises(UsageError, match="its sha256 does not match its content"):
        load_checkpoint(tmp_path / "flipped.pt", "cpu")


def test_a_checkpoint_with_code_does_not_run_it(good, tmp_path, monkeypatch, fails):
    monkeypatch.chdir(tmp_path)
    ckpt = torch.load(good, weights_only=True)
    torch.save({**ckpt, "config": Malicious()}, "zip.pt")
    torch.save({**ckpt, "config": Malicious()}, "old.pt", _use_new_zipfile_serialization=False)
    Path("plain.pt").write_bytes(pickle.dumps(Malicious()))
    for name in ("zip.pt", "old.pt", "plain.pt"):
        for module, flag in ((evaluate, "--ckpt"), (train, "--resume")):
            line = f"error: {name} is not a checkpoint, or a damaged one\n"
            assert fails(module, [flag, name]).endswith(line)
    assert not Path("executed").exists()
    torch.load("zip.pt", weights_only=False)
    assert Path("executed").exists()  # it would have run


INVALID = [  # path and value; None deletes it
    (("config",), None), (("config",), []), (("config", "data"), 5), (("config", "data"), None),
    (("class_names",), ["a"] * 11), (("class_names",), list(range(10))), (("class_names",), 7),
    (("mean",), [0.5]), (("std",), [math.nan] * 3), (("std",), ["a"] * 3), (("epoch",), None),
    (("model_config", "depth"), 10**9), (("model_config", "dim"), 10**7),  # too large for memory
    (("model_config", "depth"), None), (("model_config", "num_classes"), 11),
    (("model_config", "image_size"), 16),
    (("model_config",), 3), (("model_config",), {"depth": 3}), (("model",), []),
    (("model", "cls_token"), torch.zeros(2)), (("model", "cls_token"), None),
    (("model", "cls_token"), torch.zeros(1, 1, 64, dtype=torch.float64)),
    (("model", "cls_token"), "x"), (("model", "cls_token"), torch.full((1, 1, 64), math.nan)),
]  # fmt: skip


def test_an_invalid_checkpoint_with_a_fitting_sha256_is_one_line(good, tmp_path, fails):
    ckpt = torch.load(good, weights_only=True)
    for path, value in INVALID:
        torch.save(tampered(ckpt, *path, value=value), tmp_path / "tampered.pt")
        err = fails(evaluate, ["--ckpt", tmp_path / "tampered.pt"])
        assert "is not a valid checkpoint" in err, (path, value)
