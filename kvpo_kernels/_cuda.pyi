# The module of the CUDA kernels; it checks no more than it needs to stay in bounds.
CHUNK: int

class Error(ValueError): ...
class CudaError(RuntimeError): ...

def tve_grpo(
    pred: object,
    target: object,
    weights: object,
    grad_weights: object,
    old_scores: object,
    advantages: object,
    ref_scores: object,
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
    partials: object,
    coefficients: object,
    arrived: object,
    stream: int,
) -> None: ...
