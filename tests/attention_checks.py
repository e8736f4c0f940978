"""What holds for `routed_attention` on every backend and device, written once."""

import torch
from cases import RoutedCase
from tolerance import assert_as_accurate
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kvpo_kernels import RouteTable, quantize_frames, routed_attention

NAMES = ("out", "lse", "grad_q", "grad_k_live", "grad_v_live")
Inputs = tuple[Tensor, ...]


def output_weight(out: Tensor) -> Tensor:
    """The fixed linear form of the output that the gradients are of."""
    return torch.linspace(-1, 1, out.numel(), dtype=torch.float64).to(out).view_as(out)


def results(
    inputs: Inputs, table: RouteTable, backend: str, weight: Tensor | None = None, **options: object
) -> Inputs:
    """Output, lse, and the gradients of q, k_live and v_live."""
    q, k_pool, v_pool, k_live, v_live = inputs
    leaves = [t.detach().requires_grad_() for t in (q, k_live, v_live)]
    out, lse = routed_attention(
        leaves[0], k_pool, v_pool, table, *leaves[1:], return_lse=True, backend=backend, **options
    )
    weight = output_weight(out) if weight is None else weight
    return out.detach(), lse, *torch.autograd.grad(out, leaves, weight)


def results_of_torch(inputs: Inputs, table: RouteTable, scale: float | None = None) -> Inputs:
    """The same in torch's own attention at the inputs' precision, one row at a time."""
    q, k_pool, v_pool, k_live, v_live = inputs
    leaves = q, k_live, v_live = [t.detach().requires_grad_() for t in (q, k_live, v_live)]
    rows = []
    for b, slots in enumerate(table.slots):
        used = slots[slots >= 0].long()
        k = torch.cat([k_pool[used].flatten(0, 1), k_live[b]])
        v = torch.cat([v_pool[used].flatten(0, 1), v_live[b]])
        group = q.shape[2] // k.shape[1]
        k, v = (t.repeat_interleave(group, 1).transpose(0, 1)[None] for t in (k, v))
        row = scaled_dot_product_attention(q[b].transpose(0, 1)[None], k, v, scale=scale)
        rows.append(row[0].transpose(0, 1) if k.shape[2] else q[b] * 0)
    out = torch.stack(rows)
    lse = routed_attention(q, k_pool, v_pool, table, *leaves[1:], return_lse=True)[1]
    grads = torch.autograd.grad(out, leaves, output_weight(out), materialize_grads=True)
    return out.detach(), lse, *grads


def assert_same_bits(actual: Inputs, expected: Inputs) -> None:
    for name, a, e in zip(NAMES, actual, expected, strict=True):
        assert torch.equal(a.nan_to_num(7), e.nan_to_num(7)), name


def assert_accuracy(
    case: RoutedCase, inputs: Inputs, actual: Inputs, scale: float | None = None
) -> None:
    """Errors against float64 are at most twice (gradients: thrice) those of torch's attention."""
    table = case.table()
    same = results_of_torch(inputs, table, scale)
    truth = results(tuple(t.double() for t in inputs), table, "reference", scale=scale)
    # lse is compared to the reference in float32; three times for gradients, whose `grad_out . out`
    # sees an output already rounded.
    same = (same[0], results(inputs, table, "reference", scale=scale)[1], *same[2:])
    for name, a, s, t in zip(NAMES, actual, same, truth, strict=True):
        assert_as_accurate(name, a, s, t, slack=3.0 if "grad" in name else 2.0)


def check_accuracy(case: RoutedCase, dtype: torch.dtype, backend: str, device: str = "cpu") -> None:
    inputs = case.inputs(dtype)
    table = RouteTable(case.slot_lists(), case.F, device, allow_duplicates=case.repeats)
    actual = results(tuple(t.to(device) for t in inputs), table, backend)
    assert_accuracy(case, inputs, tuple(t.cpu() for t in actual))


def quantized(inputs: Inputs, page: torch.dtype) -> tuple[Inputs, dict[str, Tensor]]:
    """The inputs over quantized pools whose frames differ in size, and the scales."""
    q, k_pool, v_pool, *live = inputs
    sizes = torch.logspace(-2, 1, k_pool.shape[0])[:, None, None, None]
    (k, k_scales), (v, v_scales) = (
        quantize_frames(pool.float() * factor, page)
        for pool, factor in ((k_pool, sizes.flip(0)), (v_pool, sizes))
    )
    return (q, k, v, *live), {"k_scales": k_scales, "v_scales": v_scales}


def widened(inputs: Inputs, scales: dict[str, Tensor], dtype: torch.dtype) -> Inputs:
    """The same problem over pools of a float dtype."""
    pools = (
        (pool.double() * scale.double()[:, None, :, None]).to(dtype)
        for pool, scale in zip(inputs[1:3], scales.values(), strict=True)
    )
    return (inputs[0].to(dtype), *pools, *(t.to(dtype) for t in inputs[3:]))


def check_quantized(
    case: RoutedCase, dtype: torch.dtype, page: torch.dtype, backend: str, device: str = "cpu"
) -> None:
    """As accurate against float64 as torch is that widens the pages to the dtype of q."""
    inputs, scales = quantized(case.inputs(dtype), page)
    table = RouteTable(case.slot_lists(), case.F, device, allow_duplicates=case.repeats)
    there = {name: scale.to(device) for name, scale in scales.items()}
    actual = results(tuple(t.to(device) for t in inputs), table, backend, **there)
    actual, table = tuple(t.cpu() for t in actual), case.table()
    truth = results(widened(inputs, scales, torch.float64), table, "reference")
    same = results_of_torch(widened(inputs, scales, dtype), table)
    wide = results(widened(inputs, scales, torch.float32), table, "reference")
    same = (same[0], wide[1], *same[2:])
    for name, a, s, t in zip(NAMES, actual, same, truth, strict=True):
        assert_as_accurate(name, a, s, t, slack=3.0 if "grad" in name else 2.0)


def check_bits_of_rows(
    dtype: torch.dtype,
    backend: str,
    device: str = "cpu",
    threads: tuple[int, ...] = (),
    Q: int = 67,
    L: int = 101,
    heads: tuple[int, int] = (6, 2),
    D: int = 32,
) -> None:
    """A row alone, among others and in another order has the same bits, for any thread count."""
    rows = [[0, 1], [2], [], [4, 3, 1]]
    inputs = RoutedCase("", 4, Q, heads[0], D, 5, 9, 0, L, kv_heads=heads[1]).inputs(dtype)
    pool = torch.randn(2, *inputs[1].shape).to(dtype)
    inputs = tuple(t.to(device) for t in (inputs[0], *pool, *inputs[3:]))
    pick = lambda order: (inputs[0][order], *inputs[1:3], inputs[3][order], inputs[4][order])
    routes = lambda order: RouteTable([rows[b] for b in order], 5, device)
    weight = output_weight(inputs[0])
    together = results(inputs, routes(range(4)), backend, weight)
    for n in threads:
        torch.set_num_threads(n)
        assert_same_bits(results(inputs, routes(range(4)), backend, weight), together)
    order = [2, 0, 3, 1]
    permuted = results(pick(order), routes(order), backend, weight[order])
    assert_same_bits(permuted, tuple(t[order] for t in together))
    for b in range(4):
        alone = results(pick([b]), routes([b]), backend, weight[[b]])
        assert_same_bits(alone, tuple(t[[b]] for t in together))
