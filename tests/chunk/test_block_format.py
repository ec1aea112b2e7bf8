"""Numbers in four or eight bits: the arithmetic of the formats, by itself and beside that of bitsandbytes."""

import pytest
import torch

from gemini.chunk import FORMATS, BlockFormat, block_codes, dequantise, quantise

every_format = pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def numbers(numel: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(numel)).to(dtype)


@every_format
def test_each_number_becomes_the_nearest_level(form: BlockFormat) -> None:
    values = numbers(640)
    blocks = values.double().view(-1, 64)
    absmax = blocks.abs().amax(1, keepdim=True)
    levels = torch.tensor(form.levels, dtype=torch.float32).double() * absmax[..., None]
    nearest = levels.expand(10, 64, -1).gather(2, (blocks[..., None] - levels).abs().argmin(2, keepdim=True))[..., 0]
    found = dequantise(*quantise(values, form), form, torch.float32)
    assert torch.equal(found, nearest.float().view(-1))


@every_format
@pytest.mark.parametrize("numel", [1, 2, 63, 64, 65, 127, 1001])
def test_a_last_block_may_be_shorter(form: BlockFormat, numel: int) -> None:
    values = numbers(numel)
    codes, absmax = quantise(values, form)
    assert (codes.numel(), absmax.numel()) == (-(-numel // form.codes_per_byte), -(-numel // 64))
    found = dequantise(codes, absmax, form, torch.float32)[:numel]
    whole = torch.cat([values, torch.zeros(-numel % 64)])
    assert torch.equal(found, dequantise(*quantise(whole, form), form, torch.float32)[:numel])


@every_format
@every_dtype
def test_what_was_quantised_stays_as_it_is(form: BlockFormat, dtype: torch.dtype) -> None:
    values = numbers(4096, dtype)
    once = dequantise(*quantise(values, form), form, dtype)
    assert torch.equal(dequantise(*quantise(once, form), form, dtype), once)


@every_format
def test_zeros_stay_zero_nan_spreads_over_its_block_and_the_smallest_numbers_stay_small(form: BlockFormat) -> None:
    values = torch.zeros(192)
    values[64], values[128:] = torch.nan, 1e-40
    found = dequantise(*quantise(values, form), form, torch.float32).view(3, 64)
    assert torch.equal(found[0], torch.zeros(64)) and found[1].isnan().all() and (found[2].abs() <= 1e-40).all()


@every_format
def test_a_parameter_takes_no_more_than_the_format_says(form: BlockFormat) -> None:
    codes, absmax = quantise(numbers(1 << 16), form)
    assert (codes.nbytes + absmax.nbytes) / (1 << 16) == {"nf4": 0.5625, "int8": 1.0625}[form.name]


@every_format
@every_dtype
@pytest.mark.parametrize("numel", [64, 6400, 6401, 6463, 30])
def test_the_compiled_kernels_have_the_bits_of_the_reference(form: BlockFormat, dtype: torch.dtype, numel: int) -> None:
    values = numbers(numel, dtype)
    if numel > 720:
        values[5], values[100], values[200:300], values[640:704] = torch.nan, -torch.inf, 0, 1e-40
        levels = torch.tensor(form.levels)
        values[704:719] = ((levels[1:] + levels[:-1]) / 2)[:15].to(dtype)  # as close to two levels as can be
        values[719] = 1.0
    codes, absmax = quantise(values, form)
    ours = block_codes.encode(values, form)
    assert torch.equal(ours[0], codes) and torch.equal(ours[1].nan_to_num(-1.0), absmax.nan_to_num(-1.0))
    decoded, expected = block_codes.decode(codes, absmax, form, dtype), dequantise(codes, absmax, form, dtype)
    assert torch.equal(decoded.isnan(), expected.isnan())
    assert torch.equal(decoded.nan_to_num(0.0), expected.nan_to_num(0.0))


@every_format
def test_without_numba_torch_does_it(form: BlockFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    values = numbers(1000)
    expected = block_codes.encode(values, form)
    monkeypatch.setattr(block_codes, "_kernels", lambda: None)
    codes, absmax = block_codes.encode(values, form)
    assert torch.equal(codes, expected[0]) and torch.equal(absmax, expected[1])
    assert block_codes.decode(codes, absmax, form, torch.float16).dtype is torch.float16


# -- beside others


@every_dtype
@pytest.mark.parametrize("numel", [4096, 64 * 300, 1000])
def test_nf4_is_that_of_bitsandbytes(dtype: torch.dtype, numel: int) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    values, form = numbers(numel, dtype), FORMATS["nf4"]
    theirs, state = bitsandbytes.functional.quantize_4bit(values, blocksize=64, quant_type="nf4")
    codes, absmax = quantise(values, form)
    assert torch.equal(codes, theirs.view(-1)) and torch.equal(absmax, state.absmax)
    found = bitsandbytes.functional.dequantize_4bit(theirs, state).view(-1)
    assert torch.equal(dequantise(codes, absmax, form, dtype), found)


@every_dtype
def test_int8_with_our_levels_is_that_of_bitsandbytes_but_for_numbers_between_two_levels(dtype: torch.dtype) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    values, form = numbers(1 << 16, dtype), FORMATS["int8"]
    levels = torch.tensor([*form.levels, 1.0])
    theirs, state = bitsandbytes.functional.quantize_blockwise(values, code=levels, blocksize=64)
    codes, absmax = quantise(values, form)
    assert torch.equal(absmax, state.absmax)
    scaled = values.float().view(-1, 64) / absmax[:, None]
    from_midpoint = (scaled * 127 - (scaled * 127).floor() - 0.5).abs().view(-1)
    assert (from_midpoint[codes != theirs] < 2e-3).all()
    ours = dequantise(theirs, absmax, form, dtype)
    assert torch.equal(ours, bitsandbytes.functional.dequantize_blockwise(theirs, state))


def test_nf4_of_torchao_has_our_codes_and_levels_that_are_rounded_to_four_digits() -> None:
    where = "torchao.quantization.quantize_.workflows.nf4.nf4_tensor"
    nf4_tensor = pytest.importorskip(where, reason="torchao, or its NF4Tensor, is not installed")
    values, form = numbers(1 << 16), FORMATS["nf4"]
    theirs = nf4_tensor.NF4Tensor.from_tensor(values, 64, 256)
    rounded = BlockFormat("rounded", tuple(theirs.nf4.tolist()), codes_per_byte=2)
    codes, _ = quantise(values, rounded)
    assert torch.equal(codes, theirs.quantized_data)
    assert (torch.tensor(form.levels) - theirs.nf4).abs().max() < 5.1e-5
    scales = theirs.dequantize_scalers(theirs.quantized_scalers, theirs.quantization_factor, 256)
    assert torch.equal(dequantise(codes, scales, rounded, torch.float32), theirs.get_original_weight())
