"""Who is blamed, and with what type, where one argument of a call is wrong: that one.

A right argument must not be blamed because another, that is checked later, does not fit it.
"""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from kvpo_kernels import (
    ContrastiveObjective,
    HistoryRouting,
    RopeTable,
    RouteTable,
    TrajectoryEnergies,
    anchor_advantages,
    branch_policy_loss,
    candidate_frames,
    eligible_starts,
    frame_attention_mass,
    fuse_advantages,
    plan_history_routing,
    qk_norm_rope,
    qk_norm_rope_write,
    quantize_frames,
    routed_attention,
    text_relevance,
    trajectory_velocity_energy,
    tve_grpo_loss,
    velocity_gradient,
    velocity_step_weights,
)
from kvpo_kernels.errors import (
    ArgumentError,
    ConfigError,
    ConstantError,
    DtypeError,
    GradientError,
    GroupError,
    KvpoError,
    NonFiniteError,
    RangeError,
    ShapeError,
)

NAN = float("nan")
z = torch.zeros
x, w, s = torch.randn(3, 2, 5), torch.ones(2), torch.randn(3)


def grad(*shape: int) -> torch.Tensor:
    return z(*shape).requires_grad_()


CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "energy": (trajectory_velocity_energy, {"pred": x, "target": x, "step_weights": w}),
    "policy": (branch_policy_loss, {"scores": s, "old_scores": s, "advantages": s}),
    "fused": (
        tve_grpo_loss,
        {"pred": x, "target": x, "step_weights": w, "old_scores": s, "advantages": s},
    ),
    "gradient": (velocity_gradient, {"pred": x, "target": x, "weight": 1.0, "kappa": s}),
    "add": (
        lambda **k: TrajectoryEnergies(3).add(**k),
        {"pred": x, "target": x, "weight": 1.0, "branches": [0, 1, 2]},
    ),
    "accumulator": (TrajectoryEnergies, {"num_branches": 3}),
    "weights": (velocity_step_weights, {"sigmas": [1.0, 0.5]}),
    "anchor": (anchor_advantages, {"rewards": z(2, 4), "anchor_rewards": [0.0, 0.0]}),
    "fuse": (fuse_advantages, {"local": torch.randn(4), "global_": torch.randn(4)}),
    "attention": (
        routed_attention,
        {
            "q": z(2, 5, 4, 16),
            "k_pool": z(3, 7, 2, 16),
            "v_pool": z(3, 7, 2, 16),
            "table": RouteTable([[0], [1]], 3),
            "k_live": z(2, 3, 2, 16),
            "v_live": z(2, 3, 2, 16),
        },
    ),
    "quantized": (
        routed_attention,
        {
            "q": z(2, 5, 4, 16),
            "k_pool": z(3, 7, 2, 16, dtype=torch.int8),
            "v_pool": z(3, 7, 2, 16, dtype=torch.int8),
            "table": RouteTable([[0], [1]], 3),
            "k_scales": z(3, 2),
            "v_scales": z(3, 2),
        },
    ),
    "table": (RouteTable, {"slot_lists": [[0], [1, 2]], "num_slots": 3}),
    "rope": (
        qk_norm_rope,
        {
            "q": z(2, 12, 4, 16),
            "k": z(2, 12, 2, 16),
            "q_weight": z(64),
            "k_weight": z(32),
            "rope": RopeTable(16),
            "first_frame": 0,
            "grid": (3, 2, 2),
        },
    ),
    "angles": (RopeTable, {"head_dim": 16}),
    "quantize": (quantize_frames, {"frames": z(2, 4, 2, 16), "dtype": torch.int8}),
    "mass": (
        frame_attention_mass,
        {
            "q": z(2, 5, 4, 16),
            "k_pool": z(3, 7, 2, 16),
            "table": RouteTable([[0], [1]], 3),
            "lse": z(2, 4, 5),
        },
    ),
    "relevance": (
        text_relevance,
        {"text_k": z(5, 2, 16), "k_pool": z(3, 7, 2, 16), "slots": [0, 1]},
    ),
    "plan": (plan_history_routing, {"routing": HistoryRouting()}),
    "starts": (eligible_starts, {"routing": HistoryRouting(), "video_frames": 57}),
    "candidates": (candidate_frames, {"routing": HistoryRouting(), "start": 21}),
}
CALLS["write"] = (
    qk_norm_rope_write,
    {
        **CALLS["rope"][1],
        "v": z(2, 12, 2, 16),
        "k_pool": z(8, 4, 2, 16),
        "v_pool": z(8, 4, 2, 16),
        "slots": torch.arange(6).view(2, 3),
    },
)

# Whatever is no tensor, no number or no list where there should be one.
NONSENSE = [
    (call, name, value)
    for call, (_, good) in CALLS.items()
    for name in good
    for value in (None, "x", object())
    if (call, name) not in (("anchor", "weights"), ("add", "branches"))
    and not (value is None and name in ("k_live", "v_live", "k_scales", "v_scales", "global_"))
]
swapped = {"q": z(2, 4, 6, 16), "k_live": z(2, 2, 6, 16), "v_live": z(2, 2, 6, 16)}
WRONG: list[tuple[str, dict[str, Any], type[KvpoError], str]] = [
    # An axis that pred lacks shows where the weights are checked, one of both where targets are.
    ("energy", {"pred": z(2, 40), "target": z(2, 40)}, ShapeError, "^pred .*branches is missing"),
    ("energy", {"pred": z(3, 40), "target": z(3, 40)}, ShapeError, "^pred .*-steps is missing"),
    ("energy", {"pred": z(2, 4, 6), "target": z(2, 4, 6)}, ShapeError, "^pred .*branches is miss"),
    ("energy", {"pred": z(3, 4, 6), "target": z(3, 4, 6)}, ShapeError, "pred.* lacks an axis"),
    ("energy", {"pred": x[:, 0]}, ShapeError, r"^pred must be \[3, 2, 5\] like target"),
    ("energy", {"target": x[:, 0]}, ShapeError, r"^target must be \[3, 2, 5\] like pred"),
    ("energy", {"step_weights": z(5)}, ShapeError, r"^step_weights must be \[2\] or \[3, 2\]"),
    ("energy", {"target": grad(3, 2, 5)}, ConstantError, "^target requires grad"),
    ("energy", {"step_weights": grad(2)}, ConstantError, "^step_weights requires grad"),
    ("energy", {"pred": x.to_sparse()}, DtypeError, "^pred must be dense"),
    ("fused", {"pred": z(2, 40), "target": z(2, 40)}, ShapeError, "^pred .*branches is missing"),
    ("fused", {"pred": x[:2]}, ShapeError, r"^pred must be \[3, 2, 5\]"),
    ("fused", {"pred": x[:2], "target": x[:2]}, ShapeError, r"^pred must be \[3, S, ...\]"),
    ("fused", {"target": x[:2]}, ShapeError, r"^target must be \[3, 2, 5\]"),
    ("fused", {"step_weights": z(3)}, ShapeError, "^step_weights must be"),
    ("fused", {"old_scores": z(2)}, ShapeError, r"^old_scores must be \[3\]"),
    ("fused", {"grad_steps": "ab"}, DtypeError, "^grad_steps"),
    ("policy", {"scores": z(2)}, ShapeError, r"^scores must be \[3\]"),
    ("policy", {"scores": s.double()}, DtypeError, "^scores must be torch.float32"),
    ("policy", {"scores": s.to("meta")}, DtypeError, "^scores must be on cpu"),
    ("policy", {"advantages": z(4)}, ShapeError, r"^advantages must be \[3\]"),
    ("policy", {"advantages": s * NAN}, NonFiniteError, "^advantages must be finite"),
    ("policy", {"energies": s}, ArgumentError, "^give scores or energies, not both"),
    ("policy", {"old_energies": s}, ArgumentError, "^give old_scores or old_energies, not both"),
    ("policy", {"ref_scores": s, "ref_energies": s}, ArgumentError, "^give ref_scores or ref_e"),
    ("policy", {"group": "x"}, DtypeError, "^group must be a process group, got str"),
    ("policy", {"gradient": "x"}, ConfigError, "^gradient must be"),
    ("policy", {"objective": "x"}, ConfigError, "^objective must be"),
    ("gradient", {"pred": x[:2]}, ShapeError, r"^pred must be \[3, 2, 5\]"),
    ("gradient", {"target": x[:2]}, ShapeError, r"^target must be \[3, 2, 5\]"),
    ("gradient", {"weight": NAN}, NonFiniteError, "^weight must be finite"),
    ("add", {"branches": [0, 1, 3]}, RangeError, r"^branches\[2\] = 3 not in"),
    ("add", {"branches": [0, 1, 1]}, RangeError, r"^branches\[2\] = 1 is named twice"),
    ("add", {"branches": 3}, DtypeError, "^branches must be a sequence of ints"),
    ("accumulator", {"num_branches": 0}, RangeError, "^num_branches must be at least 1"),
    ("weights", {"sigmas": [1.0, NAN]}, NonFiniteError, "^sigmas must be .* at steps"),
    ("weights", {"sigmas": [1.0, 0.0]}, RangeError, "^sigmas must be .* at steps"),
    ("weights", {"temperature": 0}, ConfigError, "^temperature must be"),
    ("anchor", {"rewards": z(4)}, ShapeError, r"^rewards must be \[C, G\], got \[4\]"),
    ("anchor", {"rewards": z(4, 2)}, ShapeError, "^rewards must be .* transpose"),
    ("anchor", {"anchor_rewards": [0.0]}, ShapeError, r"^anchor_rewards must be \[2\]"),
    ("anchor", {"rewards": z(2, 4) * NAN}, NonFiniteError, r"^rewards\[0\] must be finite"),
    ("fuse", {"local": z(4) * NAN}, NonFiniteError, "^local must be finite"),
    ("fuse", {"clamp": "x"}, DtypeError, "^clamp must be a number"),
    ("attention", {"q": z(2, 5, 4, 32)}, ShapeError, r"^q must be \[B, Q, H, 16\] like the pools"),
    ("attention", {"q": z(3, 5, 4, 16)}, ShapeError, r"^q must be \[2, Q, H, D\] like table"),
    ("attention", swapped, ShapeError, r"^q must be .*looks like \[B, H, L, D\]"),
    ("attention", {"q": z(2, 4, 5, 16)}, ShapeError, r"heads of q .*q, .* looks like \[B, H, Q"),
    ("attention", {"k_pool": z(3, 2, 7, 16)}, ShapeError, r"k_pool, .* looks like \[F, H, T, D\]"),
    ("attention", {"k_pool": z(2, 7, 2, 16)}, ShapeError, "^k_pool must be .* like v_pool"),
    ("attention", {"k_pool": grad(3, 7, 2, 16)}, ConstantError, "^k_pool requires grad"),
    ("attention", {"k_live": z(2, 2, 3, 16)}, ShapeError, r"^k_live must be .*\[B, H, L, D\]"),
    ("attention", {"table": RouteTable([[0]], 3)}, ShapeError, "^table has 1 rows"),
    ("attention", {"q": z(2, 5, 4, 16).half()}, DtypeError, "or else q, as all others are"),
    ("quantized", {"k_scales": z(3)}, ShapeError, r"^k_scales must be \[3, 2\]"),
    ("quantized", {"v_scales": grad(3, 2)}, ConstantError, "^v_scales requires grad"),
    ("table", {"slot_lists": [[3]]}, RangeError, r"route\[branch=0, slot=0\] = 3 not in"),
    ("table", {"slot_lists": [0, 1]}, DtypeError, "^routes must be a list of slots"),
    ("rope", {"q": z(2, 4, 12, 16)}, ShapeError, r"^q must be .*looks like \[B, H, N, D\]"),
    ("rope", {"q": z(2, 11, 4, 16)}, ShapeError, r"^q must be \[B, 12, H, 16\] like k"),
    ("rope", {"k": z(2, 11, 2, 16)}, ShapeError, r"^k must be \[2, 12, Hkv, 16\]"),
    ("rope", {"grid": (2, 2, 2)}, ShapeError, r"^grid \(2, 2, 2\) has not the 12 tokens"),
    ("rope", {"grid": (3.0, 2, 2)}, DtypeError, r"^grid\[0\] must be an int"),
    ("rope", {"first_frame": -1}, RangeError, "^first_frame must be at least 0"),
    ("rope", {"first_frame": 1023}, RangeError, "frame 1025 not in"),
    ("rope", {"q_weight": z(32)}, ShapeError, r"^q_weight must be \[64\], got \[32\]: q has 4"),
    ("write", {"slots": torch.full((2, 3), 9)}, RangeError, r"^slots\[branch=0, frame=0\] = 9 not"),
    ("write", {"v": z(2, 12, 4, 16)}, ShapeError, "^v must be .* like k"),
    ("angles", {"head_dim": 7}, RangeError, "^head_dim must be even"),
    ("angles", {"max_frames": 0}, RangeError, "^max_frames must be at least 1"),
    ("angles", {"theta": float("inf")}, ConfigError, "^theta must be positive and finite"),
    ("mass", {"lse": z(2, 5, 4)}, ShapeError, "lse"),
    ("relevance", {"slots": [3]}, RangeError, r"^slots\[0\] = 3 not in"),
    ("relevance", {"text_k": z(5, 16)}, ShapeError, "^text_k must be"),
    ("plan", {"start_frame": 22}, ConfigError, "^start_frame = 22"),
    ("plan", {"seed": 1.5}, DtypeError, "^seed must be an int"),
]


@pytest.mark.parametrize("name", CALLS)
def test_the_calls_themselves_are_right(name: str) -> None:
    call, good = CALLS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(**good)


@pytest.mark.parametrize(("name", "changes", "kind", "match"), WRONG)
def test_the_wrong_argument_is_named(
    name: str, changes: dict[str, Any], kind: type[KvpoError], match: str
) -> None:
    call, good = CALLS[name]
    with pytest.raises(kind, match=match) as caught:
        call(**{**good, **changes})
    assert type(caught.value) is kind


@pytest.mark.parametrize(("call", "name", "value"), NONSENSE)
def test_what_is_no_such_thing_at_all_is_named(call: str, name: str, value: Any) -> None:
    function, good = CALLS[call]
    with pytest.raises(KvpoError, match="^route|^num_slots" if call == "table" else name) as e:
        function(**{**good, name: value})
    assert isinstance(e.value, (TypeError, ConfigError))


def test_queries_in_another_layout_that_fits_are_suspected() -> None:
    call, good = CALLS["attention"]
    live = {"k_live": z(2, 8, 2, 16), "v_live": z(2, 8, 2, 16)}
    with pytest.warns(UserWarning, match=r"q \[2, 4, 8, 16\] .*looks like \[B, H, Q, D\]"):
        call(**{**good, **live, "q": z(2, 4, 8, 16)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(**{**good, **live, "q": z(2, 8, 8, 16)})  # eight of each


def test_what_was_caught_before_still_is() -> None:
    for narrow in (NonFiniteError, RangeError, GroupError, ConstantError):
        assert issubclass(narrow, ShapeError) and issubclass(narrow, ValueError)
    assert issubclass(ConstantError, GradientError) and issubclass(ArgumentError, TypeError)
    with pytest.raises(ConfigError):
        ContrastiveObjective(kl_coef=NAN)
