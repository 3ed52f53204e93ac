"""The candidate codes of 8-bit states do what they promise, and their tables are the results'."""

import json
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import pytest
import torch
from torch import Tensor, nn

from benchmarks.report.files import write_rows
from benchmarks.studies.codes.__main__ import RESULTS
from benchmarks.studies.codes.adamw import AdamW, Flat, Moments
from benchmarks.studies.codes.candidates import BLOCKS, SIGNED, UNSIGNED
from benchmarks.studies.codes.code import Code
from benchmarks.studies.codes.companded import Root
from benchmarks.studies.codes.dynamic import Dynamic
from benchmarks.studies.codes.errors import averaged
from benchmarks.studies.codes.floats import Minifloat
from benchmarks.studies.codes.page import markdown
from benchmarks.studies.codes.results import FLOAT32, NUDGED, choose
from benchmarks.studies.codes.rounded import Rounded

ALL = SIGNED + UNSIGNED
PLAIN = [code for code in ALL if not isinstance(code, Rounded)]
BLOCK = 256


def name(code: Code) -> str:
    return f"{'m' if code.signed else 'v'}: {code.name}"


every_code = pytest.mark.parametrize("code", ALL, ids=name)
plain_code = pytest.mark.parametrize("code", PLAIN, ids=name)


def stored(code: Code, x: Tensor, block: int = BLOCK) -> Tensor:
    encoded, scales = code.encode(x, block)
    assert encoded.dtype == torch.uint8 and encoded.shape == (x.numel(),)
    assert scales.dtype == torch.float32 and scales.shape == (-(-x.numel() // block),)
    decoded = code.decode(encoded, scales, block)
    assert decoded.dtype == torch.float32
    return decoded.view_as(x)


def samples(code: Code, elements: int = 64 * BLOCK) -> Tensor:
    """Numbers of all magnitudes from 1e-12 to 1, among them every block's largest: 1."""
    even = torch.rand(elements)
    x = torch.where(torch.rand(elements) < 0.3, even, 10 ** (-12 * even))
    if code.signed:
        x = torch.where(torch.rand(elements) < 0.5, -x, x)
    x[::BLOCK] = 1
    return x


def points(code: Code) -> Tensor:
    return code.ratio(code.valid())


# -- code points --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "scale"),
    # A quotient may be just above the code point that the product was, and be rounded up.
    [(code, 1.0) for code in ALL] + [(code, scale) for code in PLAIN for scale in (0.7, 3e-9)],
    ids=lambda value: name(value) if isinstance(value, Code) else str(value),
)
def test_code_points_come_back_as_they_were(code: Code, scale: float) -> None:
    x = points(code) * scale
    x = torch.cat([x, x.new_tensor([scale])])  # the largest magnitude
    assert torch.equal(stored(code, x, 512), x)


@plain_code
def test_what_was_decoded_is_encoded_to_the_same_bytes(code: Code) -> None:
    x = samples(code)
    encoded, scales = code.encode(x, BLOCK)
    again, same_scales = code.encode(code.decode(encoded, scales, BLOCK), BLOCK)
    assert torch.equal(same_scales, scales)
    assert torch.equal(again, encoded)


@every_code
def test_code_points_are_distinct_and_reach_from_0_to_1(code: Code) -> None:
    values = points(code)
    assert values.max() == 1
    if code.signed and not isinstance(code, Dynamic):
        assert torch.equal(values.unique(), -values.unique().flip(0))
    magnitudes = values.abs().unique()
    least = 0 if ", no zero" not in code.name else magnitudes[0]
    assert magnitudes[0] == least
    assert len(values.unique()) >= (225 if code.signed else 240)
    if not code.signed:
        assert torch.equal(values, values.sort().values)


LARGEST = (1.0, 0.1, 1e-30, 3e38)
NEGATIVE = (-0.3, -1e-9)  # the dynamic map has 1, but not -1


@pytest.mark.parametrize(
    ("code", "largest"),
    [(code, largest) for code in ALL for largest in LARGEST]
    + [(code, x) for code in SIGNED if not isinstance(code, Dynamic) for x in NEGATIVE],
    ids=lambda value: name(value) if isinstance(value, Code) else str(value),
)
def test_the_largest_magnitude_of_a_block_comes_back_exactly(code: Code, largest: float) -> None:
    x = samples(code, BLOCK) * 0.9 * abs(largest)
    x[17] = largest
    assert stored(code, x)[17] == x[17]


# -- the nearest one ----------------------------------------------------------------------------


@plain_code
def test_the_nearest_code_point_is_chosen(code: Code) -> None:
    x = torch.cat([samples(code), halfway(code)])
    wanted = code.metric(x.double())
    distances = (wanted[:, None] - code.metric(points(code).unique().double())).abs()
    chosen = (wanted - code.metric(code.ratio(code.quantize(x)).double())).abs()
    # But for the rounding of the number in float32.
    assert (chosen <= distances.amin(dim=1) + 2e-7 * wanted.abs()).all()


def halfway(code: Code) -> Tensor:
    """Close to all boundaries between code points, from both sides."""
    low, high = points(code).unique().double().unfold(0, 2, 1).unbind(1)
    from_below, to_above = low, high
    for _ in range(60):
        middle = (from_below + to_above) / 2
        above = code.metric(middle) * 2 > code.metric(low) + code.metric(high)
        from_below = torch.where(above, from_below, middle)
        to_above = torch.where(above, middle, to_above)
    return torch.cat([middle * (1 - 1e-5), middle, middle * (1 + 1e-5)]).float()


@every_code
def test_errors_are_within_the_bound(code: Code) -> None:
    x = torch.cat([samples(code), halfway(code)] if code in PLAIN else [samples(code)])
    decoded = code.ratio(code.quantize(x))
    bound = code.bound(x.double())
    assert ((x.double() - decoded).abs() <= bound * (1 + 1e-5) + 1e-7 * x.abs()).all()
    assert (bound <= 0.07).all()


def test_rounding_up_never_makes_a_number_smaller() -> None:
    (code,) = (code for code in UNSIGNED if code.name.endswith("up"))
    x = samples(code)
    decoded = code.ratio(code.quantize(x))
    assert (decoded >= x).all()
    assert (decoded > 0).all()


DITHERED = [code for code in UNSIGNED if code.name.endswith("dithered")]


@pytest.mark.parametrize("code", DITHERED, ids=name)
def test_dithering_is_right_in_the_mean_of_positions_and_of_steps(code: Code) -> None:
    code = code.fresh()
    over_positions = code.ratio(code.quantize(torch.full((1 << 14,), 0.3)))
    one = torch.tensor([0.3])
    over_steps = torch.cat([code.ratio(code.quantize(one)) for _ in range(2000)])
    for decoded in (over_positions, over_steps):
        assert len(decoded.unique()) == 2
        assert abs(decoded.double().mean().item() - 0.3) < 1e-4


@pytest.mark.parametrize("code", DITHERED, ids=name)
def test_dithering_lets_a_slow_decay_through(code: Code) -> None:
    def decayed(code: Code) -> float:
        x = torch.full((BLOCK,), 0.3)
        for _ in range(500):
            x = stored(code, torch.cat([torch.ones(1), x[1:] * 0.999]))
        return x[1:].double().mean().item() / (0.3 * 0.999**500)

    assert decayed(code.fresh()) == pytest.approx(1, rel=0.05)  # less than to the next code point
    assert decayed(code.code) == pytest.approx(0.999**-500, rel=0.05)  # it stays what it was


@pytest.mark.parametrize("code", [c for c in UNSIGNED if ", no zero" in c.name], ids=name)
def test_codes_without_zero_make_nothing_zero(code: Code) -> None:
    x = samples(code)
    x[1::2] = 0
    assert (stored(code, x) > 0).all()


# -- blocks -------------------------------------------------------------------------------------


@every_code
def test_zeros_stay_zeros(code: Code) -> None:
    assert torch.equal(stored(code, torch.zeros(3 * BLOCK)), torch.zeros(3 * BLOCK))


@plain_code
def test_a_block_of_zeros_leaves_its_neighbours_alone(code: Code) -> None:
    x = samples(code, 3 * BLOCK)
    alone = stored(code, x)
    x[BLOCK : 2 * BLOCK] = 0
    expected = alone.clone()
    expected[BLOCK : 2 * BLOCK] = 0
    assert torch.equal(stored(code, x), expected)


@plain_code
@pytest.mark.parametrize("elements", [1, 100, BLOCK + 1, 3 * BLOCK - 1])
def test_the_last_block_may_be_shorter(code: Code, elements: int) -> None:
    x = samples(code, 3 * BLOCK)[:elements]
    x[-1] = 0.01
    first, last = x.split([elements - 1 - (elements - 1) % BLOCK, (elements - 1) % BLOCK + 1])
    assert torch.equal(stored(code, x), torch.cat([stored(code, first), stored(code, last)]))
    assert stored(code, x.view(1, -1, 1)).shape == (1, elements, 1)


@plain_code
def test_denormal_numbers(code: Code) -> None:
    x = samples(code, BLOCK) * 1e-40
    decoded = stored(code, x)
    unit = 2.0**-149
    bound = 1e-40 * code.bound((x.double() / x[0].double()).clamp(-1, 1))
    assert ((decoded.double() - x.double()).abs() <= bound * 1.001 + unit).all()
    assert decoded[0] == x[0]


@every_code
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_a_block_with_infinity_or_nan_is_lost_and_no_other(code: Code, value: float) -> None:
    x = samples(code, 2 * BLOCK)
    x[3] = value
    decoded = stored(code, x)
    assert not decoded[:BLOCK].isfinite().any()
    assert decoded[BLOCK:].isfinite().all()


# -- single codes -------------------------------------------------------------------------------


def test_minifloats_are_torchs_eight_bit_floats() -> None:
    """The 5 + 3 bits have no counterpart; 4 + 3 are float8_e4m3fn's, times a power of two."""
    code = Minifloat(4, 3, signed=True)
    magnitudes = torch.arange(121, dtype=torch.uint8)
    torchs = magnitudes.view(torch.float8_e4m3fn).float()
    assert torch.equal(code.ratio(magnitudes), torchs / torchs[-1])
    magnitudes = points(code).unique()
    ties = (magnitudes[1:] + magnitudes[:-1]) / 2
    x = torch.cat([samples(code), ties])
    expected = (x * torchs[-1]).to(torch.float8_e4m3fn).view(torch.uint8)
    assert torch.equal(code.quantize(x), expected)


def test_no_zero_moves_every_byte_by_one() -> None:
    for code in (Root(signed=False, zero=False), Root(signed=False, power=4, zero=False)):
        squares = (torch.arange(1, 257) / 256).square()
        assert torch.equal(points(code), squares if code.power == 2 else squares.square())
    least = 2.0**-19
    assert points(Minifloat(4, 4, signed=False, zero=False))[[0, 1, -1]].tolist() == [
        least,
        2 * least,
        1,
    ]


def test_the_dynamic_map_is_the_published_one() -> None:
    signed, unsigned = points(Dynamic(signed=True)), points(Dynamic(signed=False))
    assert len(signed.unique()) == len(unsigned.unique()) == 256
    assert signed[[0, 127, 255]].tolist() == pytest.approx([-0.99296875, 0, 1])
    assert unsigned[[0, 1, 2, 254, 255]].tolist() == pytest.approx(
        [0, 3.25e-7, 7.75e-7, 0.996484375, 1]
    )
    # By decades: 1 to 64 positive numbers with a sign, 2 to 128 without.
    for table, first in ((signed, 1), (unsigned, 2)):
        for decade in range(7):
            low, high = 10.0 ** (decade - 7), 10.0 ** (decade - 6)
            assert ((table > low) & (table < high)).sum() == first * 2**decade


# -- training -----------------------------------------------------------------------------------


def test_no_block_spans_two_parameters() -> None:
    shapes = [(3, 100), (256,), (1,)]
    tensors = [torch.randn(shape) for shape in shapes]
    flat = Flat(tensors)
    buffer = flat.gather(tensors)
    assert len(buffer) == 512 + 256 + 256 == sum(flat.sizes)
    assert flat.used.sum() == 557
    for tensor, part in zip(tensors, flat.scatter(buffer), strict=True):
        assert torch.equal(part, tensor)
        assert (part.data_ptr() - buffer.data_ptr()) % (256 * 4) == 0


def model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(64, 80), nn.Tanh(), nn.Linear(80, 64))


def run(one: nn.Module, step: Callable[[], object]) -> list[float]:
    generator = torch.Generator().manual_seed(2)
    losses = []
    for _ in range(20):
        x = torch.randn(16, 64, generator=generator)
        loss = (one(x) - x).square().mean()
        loss.backward()
        step()
        losses.append(loss.item())
    return losses


def test_without_codes_it_is_torchs_adamw() -> None:
    ours, theirs = model(), model()
    adamw = AdamW(ours, 0.1)
    decayed, others = (
        [p for p in theirs.parameters() if (p.dim() > 1) == matrix] for matrix in (True, False)
    )
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1)

    def step() -> None:
        reference.step()
        reference.zero_grad()

    assert run(ours, lambda: adamw.step(1e-2)) == pytest.approx(run(theirs, step), rel=1e-4)


@pytest.mark.parametrize("block", BLOCKS)
def test_encoded_states_train_nearly_as_well(block: int) -> None:
    exact, encoded = model(), model()
    plain = AdamW(exact, 0.1)
    pair = (Root(signed=True), Minifloat(5, 3, signed=False, zero=False))
    coded = AdamW(encoded, 0.1, pair, block)
    expected = run(exact, lambda: plain.step(1e-2))
    losses = run(encoded, lambda: coded.step(1e-2))
    assert losses != expected
    assert losses == pytest.approx(expected, rel=0.05)
    assert coded.parts[0][1].stored[0][0].dtype == torch.uint8  # large parameters
    assert coded.parts[1][1].stored[0].dtype == torch.float32  # biases


def test_an_update_is_made_of_what_is_not_yet_encoded() -> None:
    code = Root(signed=True, power=2), Root(signed=False)
    moments, exact = (Moments(256, pair, 256) for pair in (code, (None, None)))
    gradient = torch.randn(256)
    for one, other in zip(moments.step(gradient), exact.step(gradient), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(moments.step(gradient)[0], exact.step(gradient)[0])


# -- tables -------------------------------------------------------------------------------------


def test_the_tables_are_those_of_the_results() -> None:
    results = json.loads(RESULTS.read_text())
    assert RESULTS.with_suffix(".md").read_text() == markdown(results)


def test_the_results_are_in_the_form_that_the_command_writes(tmp_path: Path) -> None:
    write_rows(tmp_path / "codes.json", json.loads(RESULTS.read_text()))
    assert (tmp_path / "codes.json").read_text() == RESULTS.read_text()


def test_averages_of_errors_are_by_what_they_are_of() -> None:
    rows = [
        {"block": 128, "m": "linear", "once": {"norm": 1.0, "p99": 2.0}},
        {"block": 256, "m": "linear", "once": {"norm": 8.0, "p99": 8.0}},
        {"block": 128, "m": "linear", "once": {"norm": 3.0, "p99": 4.00000001}},
    ]
    assert averaged(rows, fmean) == [
        {"block": 128, "m": "linear", "once": {"norm": 2.0, "p99": 3.0}},
        {"block": 256, "m": "linear", "once": {"norm": 8.0, "p99": 8.0}},
    ]


def test_the_results_are_of_these_codes() -> None:
    results = json.loads(RESULTS.read_text())
    assert results["codes"] == [code.describe() for code in ALL]
    assert {(row["m"], row["v"], row["block"]) for row in results["training"]} == {
        (FLOAT32, FLOAT32, 0),
        (NUDGED, FLOAT32, 0),
        *choose(results),
    }
