# The native module; None of its functions checks more than it needs to stay in bounds.
WITH_OPENMP: bool
ISAS: tuple[str, ...]  # what the kernels were compiled for, the plainest first

def isa() -> str: ...
def set_isa_limit(limit: str) -> None: ...

LEAST_WORK: dict[str, int]  # by kind of work, where a call begins to take more than one thread

def threads_for(kind: str, amount: int, threads: int) -> int: ...
def set_all_threads(always: bool) -> None: ...
def last_team() -> int: ...
def velocity_energy(
    pred: object, target: object, weights: list[float], threads: int
) -> list[float]: ...
def velocity_gradient(
    pred: object, target: object, coefficients: list[float], grad: object, threads: int
) -> None: ...
def branch_policy_loss(
    scores: list[float],
    old_scores: list[float],
    advantages: list[float],
    ref_scores: list[float] | None,
    clip_low: float,
    clip_high: float,
    kl_coef: float,
    log_ratio_clamp: float,
    min_entropy_ratio: float,
    scale: float,
    branch_mass: float,
    drop: bool,
    numbers: object,
) -> None: ...
def tve_grpo(
    pred: object,
    target: object,
    weights: list[float],
    grad_weights: list[float],
    old_scores: list[float],
    advantages: list[float],
    ref_scores: list[float] | None,
    clip_low: float,
    clip_high: float,
    kl_coef: float,
    log_ratio_clamp: float,
    min_entropy_ratio: float,
    scale: float,
    branch_mass: float,
    drop: bool,
    numbers: object,
    grad: object | None,
    threads: int,
) -> None: ...
def routed_attention_forward(
    *,
    q: object,
    k_pool: object,
    v_pool: object,
    slots: object,
    k_live: object,
    v_live: object,
    k_scales: object | None,
    v_scales: object | None,
    out: object,
    lse: object,
    scale: float,
    threads: int,
) -> None: ...
def routed_attention_backward(
    *,
    grad_out: object,
    q: object,
    k_pool: object,
    v_pool: object,
    slots: object,
    k_live: object,
    v_live: object,
    k_scales: object | None,
    v_scales: object | None,
    out: object,
    lse: object,
    grad_q: object,
    grad_k_live: object,
    grad_v_live: object,
    scale: float,
    threads: int,
) -> None: ...
def norm_rope_forward(
    *,
    x: object,
    weight: object,
    cos: object,
    sin: object,
    out: object,
    eps: float,
    threads: int,
) -> None: ...
def norm_rope_backward(
    *,
    grad: object,
    x: object,
    weight: object,
    cos: object,
    sin: object,
    grad_x: object,
    grad_weight: object,
    eps: float,
    threads: int,
) -> None: ...
def norm_rope_write(
    *,
    x: object,
    weight: object,
    cos: object,
    sin: object,
    v: object,
    k_pool: object,
    v_pool: object,
    slots: object,
    eps: float,
    threads: int,
) -> None: ...
def store_frames(
    *, frames: object, pool: object, scales: object, slots: object, threads: int
) -> None: ...
def peak_flops(*, pairs: bool, threads: int, iterations: int) -> float: ...
