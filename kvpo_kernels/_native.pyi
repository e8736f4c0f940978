# The native module; None of its functions checks more than it needs to stay in bounds.
WITH_CUDA: bool

def isa() -> str: ...
def set_isa_limit(limit: str) -> None: ...
def routed_attention_forward(
    *,
    q: object,
    k_pool: object,
    v_pool: object,
    slots: object,
    k_live: object,
    v_live: object,
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
    out: object,
    lse: object,
    grad_q: object,
    grad_k_live: object,
    grad_v_live: object,
    scale: float,
    threads: int,
) -> None: ...
