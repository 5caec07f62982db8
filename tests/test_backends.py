"""How the rule is run: passes, rounding, memory; and the benchmark of it."""

from __future__ import annotations

import pytest
import torch
from support import assert_same_bits, give_gradients, leaves, make, run

from learned_optim import backends, rounding, update_rule, waves
from learned_optim.bench import step as bench
from learned_optim.bench.config import StepBenchConfig
from learned_optim.cells import CoordinateState


def test_the_head_is_evaluated_once_for_all_tensors_of_a_group(monkeypatch):
    calls = []
    original = update_rule.coefficients

    def counted(*args):
        calls.append(args)
        return original(*args)

    monkeypatch.setattr(update_rule, "coefficients", counted)
    params = leaves(*[(300, 200)] * 5, *[(n,) for n in range(1, 60)])
    run(make(params), params, 1)
    assert len(calls) == 1


def test_many_copied_tensors_are_run_in_several_waves_with_the_same_bits(monkeypatch):
    shapes = [(n, 100) for n in range(20, 50)] + [(400, 200)]
    plain, params = leaves(*shapes), leaves(*shapes)
    run(make(plain), plain, 2)
    monkeypatch.setattr(waves, "COPIED", 10_000)
    run(make(params), params, 2)
    assert_same_bits(params, plain)


def test_chunks_of_another_length_give_the_same_update(monkeypatch):
    plain, params = leaves((500, 300)), leaves((500, 300))
    run(make(plain), plain, 3)
    monkeypatch.setattr(backends, "CHUNK", 1 << 12)
    run(make(params), params, 3)
    torch.testing.assert_close(params[0], plain[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
class TestRounding:
    def rounded(self, x, noise_of, dtype):
        state = CoordinateState(x, noise_of, (x,))
        return rounding.rounded_state(state, [dtype, torch.float32, dtype]).exp_avg.double()

    def test_it_is_right_on_average_and_to_one_of_the_two_neighbours(self, dtype):
        x = torch.full((100_000,), 1.0 + 0.3 * torch.finfo(dtype).eps)
        noise = torch.rand(100_000, generator=torch.Generator().manual_seed(0))
        y = self.rounded(x, noise, dtype)
        assert set(y.unique().tolist()) == {1.0, 1.0 + torch.finfo(dtype).eps}
        assert (y.mean() - 1.0) / torch.finfo(dtype).eps == pytest.approx(0.3, abs=0.01)

    def test_it_is_odd_and_leaves_what_fits_and_what_is_not_finite(self, dtype):
        noise = torch.rand(1000, generator=torch.Generator().manual_seed(0))
        x = torch.randn(1000, generator=torch.Generator().manual_seed(1))
        assert torch.equal(self.rounded(-x, noise, dtype), -self.rounded(x, noise, dtype))
        fits = x.to(dtype).float()
        assert torch.equal(self.rounded(fits, noise, dtype), fits.double())
        special = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0])
        kept = self.rounded(special, noise[:4], dtype)
        assert torch.equal(kept.isnan(), special.isnan())
        assert torch.equal(kept[[0, 1, 3]], special[[0, 1, 3]].double())

    def test_a_slow_average_does_not_stand_still(self, dtype):
        target, v = torch.full((2000,), 1.0), torch.full((2000,), 0.5)
        slow = torch.zeros(2000)
        nearest = torch.zeros(2000, dtype=dtype)
        generator = torch.Generator().manual_seed(0)
        for _ in range(3000):
            v = 0.999 * v + 0.001 * torch.rand(2000, generator=generator)
            slow = self.rounded(slow.float() + 1e-3 * (target - slow.float()), v, dtype)
            nearest = (nearest.float() + 1e-3 * (target - nearest.float())).to(dtype)
        exact = 1.0 - (1.0 - 1e-3) ** 3000
        assert slow.mean() == pytest.approx(exact, abs=0.01)
        assert abs(nearest.double().mean() - exact) > 5 * abs(slow.mean() - exact)


def test_two_byte_state_follows_the_loss_of_four_byte_state():
    losses = []
    for state_dtype in (None, torch.bfloat16):
        generator = torch.Generator().manual_seed(0)
        target = torch.randn(300, generator=generator)
        (p,) = params = leaves((300,))
        optimizer = make(params, "base", lr=1e-2, state_dtype=state_dtype)
        for _ in range(300):
            p.grad = p.detach() - target + torch.randn(300, generator=generator)
            optimizer.step()
        losses.append(float((p.detach() - target).square().mean()))
    assert losses[1] == pytest.approx(losses[0], rel=0.15)


def test_two_byte_state_is_resumed_bit_for_bit_and_does_not_depend_on_neighbours():
    shapes = [(40, 30), (7,), (200, 200)]
    straight, alone = leaves(*shapes), leaves(*shapes)
    run(make(straight, state_dtype=torch.bfloat16), straight, 4)
    separate = [make([p], state_dtype=torch.bfloat16) for p in alone]
    for i in range(4):
        give_gradients(alone, i)
        for k, optimizer in enumerate(separate):
            optimizer.step()
            if i == 1:
                resumed = make([alone[k]], state_dtype=torch.bfloat16)
                resumed.load_state_dict(optimizer.state_dict())
                separate[k] = resumed
    assert_same_bits(alone, straight)
    kept = separate[0].state[alone[0]]
    assert {kept["exp_avg"].dtype, kept["hidden_3"].dtype} == {torch.bfloat16}
    assert kept["exp_avg_sq"].dtype == torch.float32


def test_strided_tensors_are_updated_in_place_as_contiguous_ones_are():
    strided = [torch.randn(300, 400, generator=torch.Generator().manual_seed(0))[:, ::2].requires_grad_()]
    plain = [strided[0].detach().clone(memory_format=torch.contiguous_format).requires_grad_()]
    address = strided[0].data_ptr()
    for params in (strided, plain):
        run(make(params), params, 2)
    assert strided[0].data_ptr() == address
    torch.testing.assert_close(strided[0], plain[0], rtol=1e-5, atol=1e-6)


class TestBench:
    def test_it_measures_all_optimizers_and_writes_a_table_and_a_picture(self, tmp_path, monkeypatch):
        found = bench.contenders([torch.empty(8, 8)])
        assert "ours, compiled" in found
        del found["ours, compiled"]  # which would take its time
        monkeypatch.setattr(bench, "contenders", lambda params: found)
        result = bench.run((64,), repeats=2, out=tmp_path, model=False)
        (case,) = result["devices"]["cpu"]["cases"]
        rows = case["optimizers"]
        assert {"AdamW", "AdamW (foreach)", "AdamW (fused)", "ours, eager"} <= set(rows)
        assert rows["AdamW"]["ratio"] == 1.0
        assert all(0.0 < row["low"] <= row["median"] <= row["high"] for row in rows.values())
        assert round(rows["AdamW"]["bytes"]) == 8
        assert round(rows["ours, eager"]["bytes"]) == 24
        assert "| ours, eager | 1 | 64 |" in (tmp_path / "table.md").read_text()
        pytest.importorskip("matplotlib")
        assert (tmp_path / "plots" / "step_time.png").stat().st_size > 1000

    def test_its_gpt_has_76_tensors_and_12_6_million_parameters(self):
        with torch.device("meta"):
            sizes = [p.numel() for p in bench.Gpt().parameters()]
        assert len(sizes) == 76
        assert round(sum(sizes) / 1e6, 1) == 12.6

    @pytest.mark.parametrize("wrong", [{"sizes": (0,)}, {"repeats": 0}, {"threads": -1}])
    def test_its_settings_are_checked(self, wrong):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            StepBenchConfig(**wrong)
