"""Recipes: the one to reproduce to the letter, overrides, and values that are refused."""

import dataclasses

import pytest

from cli import UsageError
from recipes import RECIPES, Recipe, with_overrides


def test_original_recipe_is_to_the_letter():
    assert RECIPES["original"] == Recipe(
        epochs=24,
        batch_size=512,
        max_lr=0.03,
        pct_start=5 / 24,
        div_factor=10.0,
        final_div_factor=10.0,
        base_momentum=0.85,
        max_momentum=0.95,
        optimizer="adamw",
        beta2=0.999,
        eps=1e-8,
        weight_decay=0.0,
        l1=2.5e-5,
        embed_init_std=1.0,
        avg_pool_init=False,
        weight_avg_frac=0.0,
        crop_padding=4,
        padding_mode="wrap",
        crop_decay_frac=0.0,
        flip_p=0.45,
        affine_p=0.5,
        translate=0.07,
        scale=0.2,
        degrees=15.0,
        cutout_p=0.65,
        cutout_size=8,
    )


@pytest.mark.parametrize("name", RECIPES)
def test_every_field_can_be_overridden(name):
    values = dataclasses.asdict(RECIPES[name])
    assignments = [f"{field}={value}" for field, value in values.items()]
    assert with_overrides(RECIPES["default"], assignments) == RECIPES[name]


INVALID = {  # an override of recipe default, and what is said about it
    "no_such=1": "--set no_such=1: no setting 'no_such'",
    "max_lr=0x10": "setting max_lr must be float",
    "batchsize=64": "is it batch_size?",
    "crop_padding": "expected NAME=VALUE",
    "crop_padding=": "setting crop_padding must be int from 0 to 31, not ''",
    "crop_padding=2.5": "setting crop_padding must be int from 0 to 31, not '2.5'",
    "crop_padding=32": "setting crop_padding must be int from 0 to 31, not 32",
    "epochs=True": "setting epochs must be int from 1",
    "epochs=2147483647": "setting epochs must be int from 1",
    "weight_decay=-1": "setting weight_decay must be float from 0",
    "weight_decay=1e999": "setting weight_decay must be float from 0",
    "max_lr=nan": "setting max_lr must be float from 1e-30",
    "max_lr=1e-320": "setting max_lr must be float from 1e-30",
    "max_lr=__import__('os')": "setting max_lr must be float",
    "beta2=1": "setting beta2 must be float from 0 to 0.9999",
    "avg_pool_init=1": "setting avg_pool_init must be True or False",
    "optimizer=adam": "setting optimizer must be adamw or muon, not 'adam'",
    "affine_p=0.5": "setting affine_p has no effect",
    "cutout_p=0.5": "setting cutout_p has no effect",
}


@pytest.mark.parametrize("text", INVALID)
def test_an_invalid_override_is_named(text):
    with pytest.raises(UsageError) as error:
        with_overrides(RECIPES["default"], [text])
    assert INVALID[text] in str(error.value)
