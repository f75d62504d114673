"""The resize against PIL itself, against open_clip's transform, and against finite differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from open_clip.transform import image_transform
from PIL import Image

from steering.errors import OptionError
from steering.rewards.pixels import PixelSpec, coefficients, eight_bit, resize

FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
}


def natural(height, width, seed=0):
    """A picture with the 1/f spectrum of photographs, a bright block and a thin dark line."""
    rng = np.random.default_rng(seed)
    power = np.fft.fftfreq(height)[:, None] ** 2 + np.fft.rfftfreq(width)[None] ** 2
    power[0, 0] = np.inf
    channels = []
    for _ in range(3):
        noise = np.fft.rfft2(rng.standard_normal((height, width))) / np.sqrt(power)
        field = np.fft.irfft2(noise, s=(height, width))
        channels.append(0.25 * field / field.std() + 0.5)
    image = np.stack(channels, -1).clip(0, 1)
    image[height // 4 : height // 2, width // 4 : width // 2] = 1
    image[height // 3 : height // 3 + 4] = 0
    return (image * 255).round().astype(np.uint8)


def noise(height, width, binary=False):
    rng = np.random.default_rng(1)
    top = 2 if binary else 256
    return (rng.integers(0, top, (height, width, 3)) * (255 if binary else 1)).astype(np.uint8)


CASES = {
    "natural 1024": natural(1024, 1024),
    "natural 512": natural(512, 512),
    "768x1344": natural(768, 1344),
    "1216x832": natural(1216, 832),
    "noise 512": noise(512, 512),
    "binary 512": noise(512, 512, binary=True),
    "up 128": natural(128, 128),
    "odd": natural(301, 517),
    "same": natural(224, 224),
}


def tensor(image):
    return torch.from_numpy(image).movedim(-1, 0)[None].float() / 255


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
def test_parity_with_the_transform_of_open_clip(case, mode):
    image = CASES[case]
    transform = image_transform(
        224, is_train=False, mean=(0, 0, 0), std=(1, 1, 1), resize_mode=mode, fill_color=40
    )
    reference = transform(Image.fromarray(image)) * 255
    config = {"size": 224, "resize_mode": mode, "fill_color": 40}
    error = (PixelSpec.from_open_clip(config).fit(tensor(image))[0] * 255 - reference).abs()
    assert error.max() <= (2 if case.startswith("up") else 1)
    assert error.mean() <= 0.01


def test_the_usual_one_pass_resize_would_fail_this_bound():
    image = CASES["natural 512"]
    reference = np.array(Image.fromarray(image).resize((224, 224), FILTERS["bicubic"]))
    once = torch.nn.functional.interpolate(
        tensor(image), (224, 224), mode="bicubic", antialias=True
    ).clamp(0, 1)
    assert (once[0].movedim(0, -1) * 255 - reference).abs().max() > 2


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("size", [(64, 64), (90, 130), (200, 200), (96, 100), (128, 60)])
def test_bit_for_bit_pil(name, size):
    # The source is wide: for tall ones Pillow 13 changed the order of the passes.
    image = noise(96, 240, binary=True)
    reference = np.array(Image.fromarray(image).resize(size[::-1], FILTERS[name]))
    got = resize(tensor(image), size, interpolation=name)[0].movedim(0, -1) * 255
    np.testing.assert_array_equal(got.round().numpy(), reference)


def test_the_width_goes_first():
    # Clamping and rounding in between keep the passes from commuting.
    image = noise(40, 40, binary=True)
    x = tensor(image)
    wide_first = resize(resize(x, (40, 56)), (56, 56))
    high_first = resize(resize(x, (56, 40)), (56, 56))
    assert not torch.equal(wide_first, high_first)
    torch.testing.assert_close(resize(x, (56, 56)), wide_first, rtol=0, atol=1e-6)


def test_pad_square_pads_before_scaling():
    image = natural(60, 100)
    canvas = Image.new("RGB", (100, 100), (255, 255, 255))
    canvas.paste(Image.fromarray(image), (0, 20))
    reference = np.array(canvas.resize((48, 48), FILTERS["bicubic"]))
    spec = PixelSpec(size=48, mode="pad_square", pad_value=1.0)
    got = spec.fit(tensor(image))[0].movedim(0, -1) * 255
    np.testing.assert_array_equal(got.round().numpy(), reference)


def test_size_may_be_a_pair():
    image = natural(160, 200)
    transform = image_transform((48, 96), is_train=False, mean=(0, 0, 0), std=(1, 1, 1))
    got = PixelSpec.from_open_clip({"size": [48, 96]}).fit(tensor(image))[0]
    torch.testing.assert_close(got, transform(Image.fromarray(image)), rtol=0, atol=1.01 / 255)


def test_apply_normalises_per_channel():
    spec = PixelSpec(size=4, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 2.0))
    out = spec.apply(torch.full((2, 3, 8, 8), 0.6))
    expected = (0.6 - torch.tensor(spec.mean)) / torch.tensor(spec.std)
    torch.testing.assert_close(out, expected.view(1, 3, 1, 1).expand(2, 3, 4, 4))


def test_coefficients_sum_to_one_and_are_shared():
    for sizes in ((1024, 224), (128, 224), (7, 3)):
        matrix = coefficients(*sizes, "lanczos", "cpu", torch.float64)
        assert matrix.shape == sizes
        torch.testing.assert_close(
            matrix.sum(0), torch.ones(sizes[1], dtype=torch.float64), rtol=0, atol=1e-4
        )
    assert coefficients(9, 5) is coefficients(9, 5)
    assert coefficients.cache_info().maxsize is not None


@pytest.mark.parametrize("mode", ["shortest", "longest_pad", "squash", "pad_square"])
@pytest.mark.parametrize("size", [5, 14])
def test_smooth_gradient_is_the_finite_difference(mode, size):
    generator = torch.Generator().manual_seed(0)
    # Away from 0 and 1 the clamp is inactive, so the map is linear and any step is exact.
    x = 0.4 + 0.2 * torch.rand(2, 3, 9, 12, generator=generator)
    direction = torch.randn(x.shape, generator=generator)
    spec = PixelSpec(size=size, mode=mode, quantise=False)
    weight = torch.randn((2, 3, size, size), generator=generator)
    x.requires_grad_()
    (weight * spec.apply(x)).sum().backward()
    step = 0.05
    with torch.no_grad():
        ahead, behind = (
            (weight * spec.apply(x + s * step * direction)).double().sum() for s in (1, -1)
        )
    slope = (ahead - behind) / (2 * step)
    torch.testing.assert_close((x.grad * direction).double().sum(), slope, rtol=1e-3, atol=1e-3)


def test_exact_gradient_goes_straight_through_the_rounding():
    x = 0.4 + 0.2 * torch.rand(1, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    grads = []
    for quantise in (True, False):
        leaf = x.clone().requires_grad_()
        (weight * resize(leaf, (8, 8), quantise=quantise)).sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)
    assert grads[0].abs().min() > 0
    with torch.no_grad():
        without = resize(x, (8, 8))
    torch.testing.assert_close(resize(x.requires_grad_(), (8, 8)).detach(), without)


def test_smooth_stays_near_pil():
    image = CASES["natural 512"]
    smooth = PixelSpec(quantise=False).fit(tensor(image))
    assert (smooth - PixelSpec().fit(tensor(image))).abs().max() < 1.2 / 255


def test_half_precision_autocast_and_inference_mode_do_not_leak_in():
    x = tensor(natural(50, 50))
    expected = resize(x, (21, 21))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(resize(x, (21, 21)), expected)
    assert torch.equal(resize(tensor(natural(50, 50)).half(), (21, 21)), expected)
    with torch.inference_mode():
        resize(x, (19, 17))
    leaf = x.clone().requires_grad_()
    resize(leaf, (19, 17)).sum().backward()
    assert leaf.grad is not None


def test_batches_equal_single_images():
    batch = torch.cat([tensor(natural(40, 56, seed)) for seed in range(3)])
    spec = PixelSpec(size=16)
    torch.testing.assert_close(
        spec.apply(batch), torch.cat([spec.apply(batch[i : i + 1]) for i in range(3)])
    )


def test_unknown_words_are_refused():
    with pytest.raises(OptionError, match="pad_square"):
        PixelSpec(mode="crop")
    with pytest.raises(OptionError, match="lanczos"):
        PixelSpec(interpolation="nearest")


def test_eight_bits_are_the_nearest():
    x = torch.tensor([-0.1, 0.4 / 255, 0.6 / 255, 99.7 / 255, 1.2])
    expected = torch.tensor([0.0, 0.0, 1.0, 100.0, 255.0]) / 255
    torch.testing.assert_close(eight_bit(x), expected)
    torch.testing.assert_close(eight_bit(x.requires_grad_()).detach(), expected)
