"""The measures that judge heat maps, where the answer is known."""

import pytest
import torch

import faithfulness


@pytest.mark.parametrize("masked", [False, True])
def test_measure_is_a_loop_over_pictures_and_steps(masked):
    generator, S, steps = torch.Generator().manual_seed(0), 32, faithfulness.STEPS
    heat, images = torch.rand(3, S, S, generator=generator), torch.randn(3, 3, S, S, generator=generator)
    weights, masks = torch.randn(3, S, S, generator=generator) / 20, heat > 0.7

    def score(pictures):
        return (pictures * weights).sum((1, 2, 3)).sigmoid()

    found = faithfulness.measure(heat, images, masks if masked else None, score, generator)
    bell = torch.tensor([[2.718281828459045 ** (-((i - j) ** 2) / (2 * faithfulness.BLUR**2)) for j in range(S)] for i in range(S)])
    bell = bell / bell.sum(1, keepdim=True)
    for i in range(3):
        blurred = torch.einsum("yv,xu,cvu->cyx", bell, bell, images[i])
        for name, start, end in (("insertion", blurred, images[i]), ("deletion", images[i], torch.zeros(3, S, S))):
            place, picture, chances = heat[i].flatten().argsort(descending=True), start.clone().flatten(1), []
            for step in range(steps + 1):
                taken = place[: step * S * S // steps]
                picture[:, taken] = end.flatten(1)[:, taken]
                chances.append(score(picture.view(1, 3, S, S)).item())
            assert found[name][i].item() == pytest.approx((sum(chances) - (chances[0] + chances[-1]) / 2) / steps, abs=1e-5)
    assert set(found) == {"insertion", "deletion"} | ({"pointing", "inside"} if masked else set())
    assert not masked or found["pointing"].tolist() == [1, 1, 1]


def test_equally_hot_pixels_come_in_random_order():
    end, heat = torch.ones(400, 3, 8, 8), torch.zeros(400, 8, 8)
    heat[:, 7, 7] = 1
    seen = []
    faithfulness.replace_in_order(lambda images: seen.append(images[:, 0]) or torch.zeros(len(images)), 0 * end, end, heat, torch.Generator().manual_seed(0))
    assert (seen[1][:, 7, 7] == 1).all() and (seen[1].sum((1, 2)) == 2).all()
    half = seen[faithfulness.STEPS // 2].mean(0).flatten()[:63]
    assert half.min() > 0.35 and half.max() < 0.65


def test_pointing_and_heat_inside():
    masks = torch.zeros(4, 4, 4, dtype=torch.bool)
    masks[:, :2, :2] = True  # a quarter of the picture
    heat = torch.zeros(4, 4, 4)
    heat[0, 1, 1], heat[0, 3, 3] = 1.0, 0.5
    heat[1, 3, 3], heat[1, 0, 0] = 1.0, 0.25
    heat[2, 0, 0] = heat[2, 3, 0] = 1.0  # two hottest, one of them inside; the last map is zero
    assert faithfulness.pointing(heat, masks).tolist() == [1, 0, 0.5, 0.25]
    assert faithfulness.heat_inside(heat, masks).tolist() == pytest.approx([2 / 3, 0.2, 0.5, 0.25])


def test_summary_is_mean_and_standard_error():
    rows = faithfulness.summarise({"a": {"insertion": torch.tensor([1.0, 2.0, 3.0, 4.0])}}, n=4)
    assert rows == [{"n": 4, "map": "a", "insertion": 2.5, "insertion_se": pytest.approx((5 / 3) ** 0.5 / 2)}]
    assert faithfulness.table(rows).splitlines() == ["| map | insertion AUC ↑ |", "| --- | --- |", "| a | 2.500 ± 0.645 |"]
