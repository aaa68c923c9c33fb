"""Drawn labels come from a counter, have the model's distribution, and need no luck."""

from __future__ import annotations

import math

import pytest
import torch
from dense import mix as mix_integers
from dense import uniform as uniform_integers

from raycurv.batch import Batch
from raycurv.mathematics.loss.draws import _mix, draw_categorical, id_keys, uniforms
from raycurv.mathematics.loss.objective import Regression

# Every statistical test draws from fixed seeds: it passes or fails always. ALPHA is how rare an
# excess must be under the right distribution to be called wrong.
ALPHA = 1e-6


def signed(x: int) -> int:
    return (x + 2**63) % 2**64 - 2**63


@pytest.mark.parametrize("state", [0, 1, -1, 2**63 - 1, -(2**63), 0x123456789ABCDEF])
@pytest.mark.parametrize("field", [0, 1, 2, 7, 10**9, 2**62, -1, -(2**63)])
def test_the_mixer_is_splitmix64_on_wrapping_integers(state: int, field: int) -> None:
    want = signed(mix_integers(state % 2**64, field % 2**64))
    tensor = torch.tensor([state])
    assert int(_mix(tensor, torch.tensor([field]))) == want
    assert int(_mix(tensor, field)) == want


def test_splitmix64_gives_its_published_numbers() -> None:
    # Steele, Lea & Flood 2014; the first outputs of the reference implementation from state 0.
    first = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [int(_mix(torch.zeros(1, dtype=torch.int64), k)) % 2**64 for k in range(3)] == first


@pytest.mark.parametrize("seed", [0, 1, 12345, 2**40])
def test_uniforms_are_the_counters_in_integers(seed: int) -> None:
    ids, positions = ["", "a", "file.py:17", "naïve id #2"], [0, 1, 5, 100_000]
    for draw in (0, 1, 2, 9):
        got = uniforms(seed, id_keys(ids), torch.tensor(positions), draw, 3)
        for n, name in enumerate(ids):
            for t, position in enumerate(positions):
                for k in range(3):
                    assert float(got[n, t, k]) == uniform_integers(seed, name, position, draw, k)


def test_a_uniform_number_does_not_depend_on_what_is_beside_it() -> None:
    ids = [f"row {n}" for n in range(50)]
    whole = uniforms(3, id_keys(ids), torch.arange(20), 1, 4)
    assert torch.equal(uniforms(3, id_keys(ids[17:18]), torch.arange(7, 9), 1, 2)[0],
                       whole[17, 7:9, :2])  # fmt: skip
    # The control: each field counts.
    for other in (
        uniforms(4, id_keys(ids), torch.arange(20), 1, 4),
        uniforms(3, id_keys(ids[::-1]), torch.arange(20), 1, 4),
        uniforms(3, id_keys(ids), torch.arange(1, 21), 1, 4),
        uniforms(3, id_keys(ids), torch.arange(20), 0, 4),
    ):
        assert (other != whole).all()


def excess(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """The chance of a chi-square as large as this or larger."""
    x = ((counts - expected) ** 2 / expected).sum()
    half = torch.tensor((len(counts) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(half, x / 2))


def test_uniform_numbers_are_uniform_and_unrelated() -> None:
    u = uniforms(0, id_keys([f"id {n}" for n in range(400)]), torch.arange(100), 0, 2)
    assert float(u.min()) > 0 and float(u.max()) < 1
    counts = torch.histc(u.flatten(), bins=64, min=0, max=1).double()
    assert excess(counts, torch.full_like(counts, u.numel() / 64)) > ALPHA
    # Neighbours of every kind: correlation of m pairs is normal with deviation 1/sqrt(m).
    for a, b in (
        (u[:-1], u[1:]),
        (u[:, :-1], u[:, 1:]),
        (u[:, :, :1], u[:, :, 1:]),
        (u, uniforms(1, id_keys([f"id {n}" for n in range(400)]), torch.arange(100), 0, 2)),
    ):
        pair = torch.stack([a.flatten(), b.flatten()])
        assert abs(float(torch.corrcoef(pair)[0, 1])) < 5 / math.sqrt(pair.shape[1])


def test_drawn_categories_have_the_softmaxs_frequencies() -> None:
    logits = torch.randn(12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    count = 40_000
    u = uniforms(0, id_keys([f"id {n}" for n in range(count)]), torch.zeros(1).long(), 0, 1)
    drawn = draw_categorical(logits.expand(count, -1), u.flatten())
    counts = torch.bincount(drawn, minlength=12).double()
    assert excess(counts, count * logits.softmax(dim=0)) > ALPHA
    # The control: a slightly warmer softmax is told apart.
    assert excess(counts, count * (0.9 * logits).softmax(dim=0)) < ALPHA


@pytest.mark.parametrize("classes", [1, 3, 512, 513, 5000, 100_003])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_two_levels_draw_what_one_long_sum_draws(classes: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(classes)
    rows = 300 if classes < 50_000 else 60
    logits = (2 * torch.randn(rows, classes, generator=generator, dtype=torch.float64)).to(dtype)
    u = torch.rand(rows, generator=generator, dtype=torch.float64)
    u[:2] = torch.tensor([2.0**-53, 1 - 2.0**-53])
    work = logits if dtype == torch.float64 else logits.float()
    weights = (work - work.amax(dim=1, keepdim=True)).exp().double()
    sums = weights.cumsum(dim=1)
    want = torch.searchsorted(sums, (u * sums[:, -1])[:, None])[:, 0].clamp(max=classes - 1)
    assert torch.equal(draw_categorical(logits, u), want)
    # Numbers that fall just behind an edge, by less than a float32 sum can tell.
    some = torch.randint(classes, (rows, 1), generator=generator)
    share = weights.gather(1, some)
    behind = (sums.gather(1, some) - share * (1 - 1e-3)) / sums[:, -1:]
    assert torch.equal(draw_categorical(logits, behind[:, 0]), some[:, 0])


def test_a_class_of_no_weight_is_never_drawn() -> None:
    logits = torch.full((4, 1500), -torch.inf)
    logits[:, [3, 700, 1100]] = 0.0
    u = torch.tensor([2.0**-53, 0.34, 0.67, 1 - 2.0**-53], dtype=torch.float64)
    assert draw_categorical(logits, u).tolist() == [3, 700, 1100, 1100]


def test_gaussian_labels_have_the_outputs_mean_and_unit_variance() -> None:
    count = 20_000
    ids = tuple(f"id {n}" for n in range(count))
    keys, outputs = id_keys(ids), torch.tensor([3.0, -1.0]).expand(count, -1)
    drawn = Regression().sample(
        outputs,
        Batch(0, ids, outputs),
        lambda k: uniforms(0, keys, torch.zeros(1).long(), 0, k)[:, 0],
    )
    noise = drawn - outputs
    assert noise.dtype == torch.float64
    # Five deviations of a mean, of a variance, of a covariance.
    assert (noise.mean(dim=0).abs() < 5 / math.sqrt(count)).all()
    assert ((noise.var(dim=0) - 1).abs() < 5 * math.sqrt(2 / count)).all()
    assert abs(float(noise.prod(dim=1).mean())) < 5 / math.sqrt(count)
    edges = torch.tensor([k / 32 for k in range(1, 32)], dtype=torch.float64)
    bins = torch.bucketize(noise[:, 0].contiguous(), torch.special.ndtri(edges))
    counts = torch.bincount(bins, minlength=32).double()
    assert excess(counts, torch.full_like(counts, count / 32)) > ALPHA
